#include "fiber.h"

#include <cstdint>

#if defined(__x86_64__)

// swapcontext makes two system calls for the signal mask, which would be most of a run's time. By the calling
// convention six registers survive a call; the caller has saved the others.
extern "C" void fusewright_emulation_switch(void** saved_stack_pointer, void* stack_pointer);
asm(R"(
.text
.type fusewright_emulation_switch, @function
.hidden fusewright_emulation_switch
.globl fusewright_emulation_switch
fusewright_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusewright_emulation_switch, . - fusewright_emulation_switch
)");

namespace fusewright::emulation {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  // Six registers, the address to return to, and a slot that keeps the stack aligned as at the entry of a function.
  void** frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
}

void Fiber::switch_to(Fiber& next) { fusewright_emulation_switch(&stack_pointer_, next.stack_pointer_); }

}  // namespace fusewright::emulation

#else

namespace fusewright::emulation {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& next) { swapcontext(&context_, &next.context_); }

}  // namespace fusewright::emulation

#endif
