// Tiled copies between global and shared memory by the tensor memory accelerator.

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>

#include "cuda.h"
#include "emulation/asynchronous.h"
#include "grid.h"
#include "swizzle.h"

namespace fusewright::emulation {
namespace {

constexpr int most_dimensions = 5;

struct Map {
  unsigned char* data;
  uint64_t stride[most_dimensions];  // bytes; of the innermost dimension, the element
  uint32_t size[most_dimensions];
  uint16_t box[most_dimensions];
  uint8_t rank;
  uint8_t element;
  uint8_t swizzle;
  uint8_t valid;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));
constexpr uint8_t valid_mark = 0xA5;

int element_bytes(CUtensorMapDataType type) {
  return type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
}

int box_bytes(const Map& map) {
  int bytes = map.element;
  for (int dim = 0; dim < map.rank; ++dim) bytes *= map.box[dim];
  return bytes;
}

// Calls body(offset in the unswizzled box, nullptr or the address of the row) for each innermost row of the box.
void for_each_row(const Map& map, const int* coordinates, const std::function<void(size_t, unsigned char*)>& body) {
  const size_t row_bytes = size_t{map.box[0]} * map.element;
  const size_t rows = box_bytes(map) / row_bytes;
  for (size_t row = 0; row < rows; ++row) {
    size_t rest = row;
    unsigned char* address = map.data;
    for (int dim = 1; dim < map.rank; ++dim) {
      const int64_t position = coordinates[dim] + static_cast<int64_t>(rest % map.box[dim]);
      rest /= map.box[dim];
      if (position < 0 || position >= map.size[dim]) address = nullptr;
      if (address != nullptr) address += position * static_cast<int64_t>(map.stride[dim]);
    }
    body(row * row_bytes, address);
  }
}

// Where a part of a box row lies in global and in shared memory: 16 bytes, or an element at the edge of the tensor.
struct Chunk {
  unsigned char* global;
  unsigned char* shared;
  size_t bytes;
  bool inside;
};

void for_each_chunk(const Map& map, const int* coordinates, unsigned char* shared,
                    const std::function<void(const Chunk&)>& body) {
  const Swizzle swizzle = static_cast<Swizzle>(map.swizzle);
  for_each_row(map, coordinates, [&](size_t offset, unsigned char* row) {
    const auto is_inside = [&](int64_t position) { return position >= 0 && position < map.size[0]; };
    const int most = 16 / map.element;
    for (int i = 0; i < map.box[0];) {
      const int64_t position = coordinates[0] + static_cast<int64_t>(i);
      const bool inside = is_inside(position);
      const int elements = inside == is_inside(position + most - 1) && i % most == 0 ? most : 1;
      const uintptr_t plain = reinterpret_cast<uintptr_t>(shared) + offset + size_t(i) * map.element;
      body({row + position * map.element, reinterpret_cast<unsigned char*>(swizzled(plain, swizzle)),
            size_t(elements) * map.element, row != nullptr && inside});
      i += elements;
    }
  });
}

Map decode(const CUtensorMap* map, const void* shared, const void* pc) {
  Map decoded;
  std::memcpy(&decoded, map, sizeof(decoded));
  if (decoded.valid != valid_mark) grid.fail("the tensor map was not encoded", pc);
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) {
    grid.fail("a tensor copy's shared memory begins at " + grid.describe_shared(shared) + ", which 128 does not divide",
              pc);
  }
  return decoded;
}

void load_tile(void* shared, const CUtensorMap* map, uint64_t* barrier, const int* coordinates, const void* pc) {
  const Map decoded = decode(map, shared, pc);
  std::array<int, most_dimensions> at;
  std::copy_n(coordinates, decoded.rank, at.begin());
  check_usable_by_copies(barrier, pc);
  AsyncOperation operation = grid.asynchronous().issue("the load of a tile to " + grid.describe_shared(shared));
  operation.run = [=](const AsyncOperation& self) {
    for_each_chunk(decoded, at.data(), static_cast<unsigned char*>(shared), [&](const Chunk& chunk) {
      if (chunk.inside) grid.check_async_access(self, chunk.global, chunk.bytes, Access::read, pc);
      grid.check_async_access(self, chunk.shared, chunk.bytes, Access::write, pc);
      if (chunk.inside) {
        std::memcpy(chunk.shared, chunk.global, chunk.bytes);
      } else {
        std::memset(chunk.shared, 0, chunk.bytes);
      }
    });
    land_at(barrier, self, box_bytes(decoded));
  };
  grid.asynchronous().add(std::move(operation));
  grid.maybe_yield();
}

}  // namespace

void tensor_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, const int* coordinates,
                           unsigned ranks) {
  const void* pc = __builtin_return_address(0);
  if (ranks == 0 || ranks >> grid.blocks_of_cluster() != 0) {
    grid.fail("a multicast to blocks " + std::to_string(ranks) + " of a cluster of " +
                  std::to_string(grid.blocks_of_cluster()),
              pc);
  }
  for (int rank = 0; rank < grid.blocks_of_cluster(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    load_tile(shared_of_rank(shared, rank), map, static_cast<uint64_t*>(shared_of_rank(barrier, rank)), coordinates,
              pc);
  }
}

void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier, const int* coordinates) {
  load_tile(shared, map, barrier, coordinates, __builtin_return_address(0));
}

void tensor_store(const CUtensorMap* map, const void* shared, const int* coordinates) {
  const void* pc = __builtin_return_address(0);
  const Map decoded = decode(map, shared, pc);
  std::array<int, most_dimensions> at;
  std::copy_n(coordinates, decoded.rank, at.begin());
  const std::shared_ptr<BulkGroup> group = open_bulk_group(grid.current());
  AsyncOperation operation = grid.asynchronous().issue("the store of a tile from " + grid.describe_shared(shared));
  unsigned char* source = static_cast<unsigned char*>(const_cast<void*>(shared));
  operation.run = [=](const AsyncOperation& self) {
    for_each_chunk(decoded, at.data(), source, [&](const Chunk& chunk) {
      if (!chunk.inside) return;
      grid.check_async_access(self, chunk.shared, chunk.bytes, Access::read, pc);
      grid.check_async_access(self, chunk.global, chunk.bytes, Access::write, pc);
      std::memcpy(chunk.global, chunk.shared, chunk.bytes);
    });
    group->finish_reading(self);
    group->land(self);
  };
  grid.asynchronous().add(std::move(operation));
  grid.maybe_yield();
}

}  // namespace fusewright::emulation

using namespace fusewright::emulation;

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int element = element_bytes(type);
  Map encoded = {};
  bool valid = rank >= 1 && rank <= most_dimensions && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (cuuint32_t dim = 0; valid && dim < rank; ++dim) {
    valid = sizes[dim] >= 1 && sizes[dim] <= uint64_t{1} << 32 && box[dim] >= 1 && box[dim] <= 256 &&
            element_strides[dim] == 1;
    if (dim > 0) valid &= strides[dim - 1] % 16 == 0 && strides[dim - 1] < uint64_t{1} << 40;
    encoded.size[dim] = static_cast<uint32_t>(sizes[dim]);
    encoded.stride[dim] = dim == 0 ? element : strides[dim - 1];
    encoded.box[dim] = static_cast<uint16_t>(box[dim]);
  }
  const int row_bytes = valid ? static_cast<int>(box[0]) * element : 0;
  const int span = swizzle_span(static_cast<Swizzle>(swizzle));
  if (!valid || row_bytes % 16 != 0 || (span != 0 && row_bytes > span)) return CUDA_ERROR_INVALID_VALUE;
  encoded.data = static_cast<unsigned char*>(data);
  encoded.rank = static_cast<uint8_t>(rank);
  encoded.element = static_cast<uint8_t>(element);
  encoded.swizzle = static_cast<uint8_t>(swizzle);
  encoded.valid = valid_mark;
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}
