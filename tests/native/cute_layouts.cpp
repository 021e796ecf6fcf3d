// Prints, as CuTe's layout algebra says, where Hopper's operands, accumulators and descriptors have their elements.
// Plain C++; nothing of this project takes part. Lines: a name, then numbers.

#include <cstdio>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/pointer_flagged.hpp>
#include <cute/swizzle_layout.hpp>

using namespace cute;

namespace {

using Element = cutlass::bfloat16_t;

// Offsets in elements of (row, column), column by column. The atoms' swizzles are of bytes; CuTe makes them those of
// elements here.
template <class Layout>
void print_matrix(const char* name, const Layout& layout_of_bytes) {
  const auto layout = as_position_independent_swizzle_layout(layout_of_bytes);
  std::printf("%s", name);
  for (int column = 0; column < size<1>(layout); ++column) {
    for (int row = 0; row < size<0>(layout); ++row) std::printf(" %d", int(layout(row, column)));
  }
  std::printf("\n");
}

// For thread and register: the element's place in the matrix, counted column by column.
template <class Layout>
void print_fragment(const char* name, const Layout& layout) {
  std::printf("%s", name);
  for (int thread = 0; thread < size<0>(layout); ++thread) {
    for (int value = 0; value < size<1>(layout); ++value) std::printf(" %d", int(layout(thread, value)));
  }
  std::printf("\n");
}

// Of one product's operand, (64 or 128, 16) at the start of the tile.
template <SM90::GMMA::Major major, int rows, class Layout>
void print_descriptor(const char* name, const Layout& layout) {
  alignas(1024) static Element storage[1 << 15];
  const auto tensor = make_tensor(make_smem_ptr(storage), layout);
  const auto operand = local_tile(tensor, make_shape(Int<rows>{}, Int<16>{}), make_coord(0, 0));
  const auto descriptor = SM90::GMMA::make_gmma_desc<major>(operand);
  std::printf("%s %d %d %d\n", name, int(descriptor.bitfield.leading_byte_offset_),
              int(descriptor.bitfield.stride_byte_offset_), int(descriptor.bitfield.layout_type_));
}

}  // namespace

int main() {
  namespace gmma = SM90::GMMA;
  // Rows of 64 adjacent elements; and 128 rows of 128, two slabs.
  const auto rows = tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{}, make_shape(Int<128>{}, Int<128>{}));
  // 128 columns, adjacent, of 128 rows: the operand's first index is the column.
  const auto columns =
      tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{}, make_shape(Int<128>{}, Int<128>{}), Step<_2, _1>{});
  print_matrix("rows", rows);
  print_matrix("columns", columns);
  print_fragment("accumulator", gmma::CLayout_64x128{});
  print_fragment("operand", gmma::ALayout_64x16{});
  using Warp = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  print_fragment("warp_a", Warp::ALayout{});
  print_fragment("warp_b", Warp::BLayout{});
  print_fragment("warp_d", Warp::CLayout{});
  print_descriptor<gmma::Major::K, 64>("rows_descriptor", rows);
  print_descriptor<gmma::Major::MN, 128>("columns_descriptor", columns);
}
