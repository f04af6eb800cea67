// Tiles of products on matrix units, for any number of rows and columns: 64 rows by 128 columns by 128 bytes of either operand at
// a time, through a ring of stages filled by asynchronous copies. Eight warps, two by four, own 32 × 32 of the product each.
//
// A stage holds rows of 128 bytes, 64 of the left operand and 128 of the right one. Within a row the 16-byte chunks are turned by
// the row's number, so that neither ldmatrix (eight rows, one chunk) nor a float32 fragment (eight rows, four chunks) meets a bank
// twice.
#pragma once

#include "mma.cuh"

namespace fpet {
namespace cuda {

constexpr int kTileA = 64, kTileB = 128, kTileThreads = 256, kRowBytes = 128;
constexpr int kStageBytes = (kTileA + kTileB) * kRowBytes;

FPET_DEVICE int turn_of(int row) { return (row & 1) << 6 | (row >> 1 & 3) << 4; }
FPET_DEVICE int turned(int row, int chunk) { return row * kRowBytes + (chunk << 4 ^ turn_of(row)); }

// --- fragments --------------------------------------------------------------------------------------------------------------------------
// (row, chunk) is their first element, in units of rows and of 16 bytes: a multiple of 8, an even number. What depends on the lane
// is worked out once.

// 16 × 16 of a left operand stored [m][k].
FPET_DEVICE void load_left(uint32_t (&a)[4], const char* tile, int row, int chunk) {
  const int l = lane_index();
  ldmatrix(a, tile + row * kRowBytes + (turned(l % 16, l / 16) ^ chunk << 4));
}
// The same, stored [k][m]: row counts k, chunk counts m.
FPET_DEVICE void load_left_turned(uint32_t (&a)[4], const char* tile, int row, int chunk) {
  const int l = lane_index();
  ldmatrix_transposed(a, tile + row * kRowBytes + (turned(l % 8 + l / 16 * 8, l / 8 % 2) ^ chunk << 4));
}
// 16 × 16 of a right operand stored [n][k]: fragments of columns n and n + 8.
FPET_DEVICE void load_right(uint32_t (&b)[2][2], const char* tile, int row, int chunk) {
  const int l = lane_index();
  uint32_t r[4];
  ldmatrix(r, tile + row * kRowBytes + (turned(l % 8 + l / 16 * 8, l / 8 % 2) ^ chunk << 4));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
// The same, stored [k][n].
FPET_DEVICE void load_right_turned(uint32_t (&b)[2][2], const char* tile, int row, int chunk) {
  const int l = lane_index();
  uint32_t r[4];
  ldmatrix_transposed(r, tile + row * kRowBytes + (turned(l % 16, l / 16) ^ chunk << 4));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
// 16 bytes of a row, chunk a multiple of 4: lane 4 g + t takes those t chunks on of the row g rows on.
FPET_DEVICE float4 load_four(const char* tile, int row, int chunk) {
  const int l = lane_index();
  return *(const float4*)(tile + row * kRowBytes + (turned(l / 4, l % 4) ^ chunk << 4));
}

// Two float32 as three pairs of bfloat16 that add up to them.
struct Three {
  uint32_t part[3];
};
FPET_DEVICE Three split_three(float v0, float v1) {
  Three r;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    r.part[i] = pack<bf16>(v0, v1);
    v0 -= low_half<bf16>(r.part[i]);
    v1 -= high_half<bf16>(r.part[i]);
  }
  return r;
}

// --- products of a stage -----------------------------------------------------------------------------------------------------------------

using Tile = float[2][4][4];  // of one warp: 2 × 16 rows, 4 × 8 columns

FPET_DEVICE int warp_row() { return warp_index() / 4 * 32; }
FPET_DEVICE int warp_column() { return warp_index() % 4 * 32; }
// Row and first column of d[m][n][2 * half], [2 * half + 1].
FPET_DEVICE int tile_row(int m, int half) { return warp_row() + m * 16 + half * 8 + lane_index() / 4; }
FPET_DEVICE int tile_column(int n) { return warp_column() + n * 8 + lane_index() % 4 * 2; }

// d += left rightᵀ over the 128 bytes of their rows. EXACT: rounded as float32 sums are, not cut off.
template <class S, bool EXACT>
FPET_DEVICE void add_products(Tile& d, const char* left, const char* right) {
  if constexpr (sizeof(S) == 2) {
#pragma unroll 1  // the next fragments would not fit
    for (int k = 0; k < 8; k += 2) {
      pass<place::step_products>();
      uint32_t a[2][4], b[2][2][2];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_left(a[m], left, warp_row() + m * 16, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) load_right(b[n], right, warp_column() + n * 16, k);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          if constexpr (EXACT) {
            mma_exact<S>(d[m][n], a[m], b[n / 2][n % 2]);
          } else {
            mma16<S>(d[m][n], a[m], b[n / 2][n % 2]);
          }
    }
  } else {
    // Which k a fragment's element stands for does not matter as long as it is the same on both sides: a lane takes 16 bytes.
#pragma unroll 1
    for (int k = 0; k < 8; k += 4) {
      pass<place::step_products>();
      uint32_t a[3][2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 v = load_four(left, warp_row() + m * 16 + half * 8, k);
          const Three low = split_three(v.x, v.y), high = split_three(v.z, v.w);
#pragma unroll
          for (int i = 0; i < 3; ++i) a[i][m][half] = low.part[i], a[i][m][2 + half] = high.part[i];
        }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float4 v = load_four(right, warp_column() + n * 8, k);
        const Three low = split_three(v.x, v.y), high = split_three(v.z, v.w);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int order = 2; order >= 0; --order)  // the smallest first
#pragma unroll
            for (int i = order; i >= 0; --i) {
              const uint32_t b[2] = {low.part[order - i], high.part[order - i]};
              mma_bf16(sum, a[i][m], b);
            }
#pragma unroll
          for (int e = 0; e < 4; ++e) d[m][n][e] += sum[e];
        }
      }
    }
  }
}

template <class S, bool EXACT>
FPET_DEVICE void add_products(Tile& d, const char* stage) {
  add_products<S, EXACT>(d, stage, stage + kTileA * kRowBytes);
}

// --- filling a stage ------------------------------------------------------------------------------------------------------------------------

// 16 bytes a thread: chunk threadIdx.x % 8 of rows threadIdx.x / 8 + 32 r.
FPET_DEVICE int copy_chunk() { return int(threadIdx.x) % 8; }
FPET_DEVICE int copy_row(int r) { return int(threadIdx.x) / 8 + 32 * r; }
FPET_DEVICE char* copy_target(char* tile, int r) { return tile + turned(copy_row(0), copy_chunk()) + 32 * r * kRowBytes; }

// 16 bytes of a row of `length` elements of S, from element `at` on; zeros behind its end and where it is not valid.
template <class S>
FPET_DEVICE void copy_row_chunk(char* to, const S* row, int at, int length, int64_t stride, bool aligned, bool valid) {
  valid = valid && at < length;
  if (aligned) {
    copy_async<16>(to, valid ? row + at : row, valid);
  } else {
    row += at * stride;
#pragma unroll 1
    for (int e = 0; e < 16 / int(sizeof(S)); ++e, row += stride) ((S*)to)[e] = valid && at + e < length ? *row : S{};
  }
}

// Products of parts (a, b), smallest first; a key of `parts` parts begins at first_pair(parts).
constexpr int kPairs = 6;
FPET_DEVICE int first_pair(int parts) { return parts == 3 ? 0 : parts == 2 ? 2 : 5; }
FPET_DEVICE int pair_left(int i) { return (0x201100 >> 4 * (kPairs - 1 - i)) & 15; }
FPET_DEVICE int pair_right(int i) { return (0x021010 >> 4 * (kPairs - 1 - i)) & 15; }

// 64 channels of prepared keys: part a of 64 sources from row i0, part b of 128 destinations from row j0.
FPET_DEVICE void copy_keys(char* stage, const bf16* keys, int parts, int padded, int64_t image_row, int num_a, int num_b,
                           int i0, int j0, int channel, int part_a, int part_b) {
  const int stride = parts * padded;
  const bf16* at = keys + image_row * stride + channel + copy_chunk() * 8;
#pragma unroll
  for (int r = 0; r < kTileA / 32; ++r) {
    const int row = copy_row(r);
    const bool valid = i0 + row < num_a;
    copy_async<16>(copy_target(stage, r), valid ? at + int64_t(i0 + row) * stride + part_a * padded : keys, valid);
  }
#pragma unroll
  for (int r = 0; r < kTileB / 32; ++r) {
    const int row = copy_row(r);
    const bool valid = j0 + row < num_b;
    copy_async<16>(copy_target(stage + kTileA * kRowBytes, r),
                   valid ? at + int64_t(num_a + j0 + row) * stride + part_b * padded : keys, valid);
  }
}

// A ring of `stages` stages (2 to 4): `next(fill)` waits for the oldest, lets all threads pass, refills the one they have left with
// fill(stage), and returns the oldest. fill must copy by copy_async or plain stores, and may do nothing.
template <int stage_bytes = kStageBytes>
struct Ring {
  char* base;
  int stages, oldest = 0;

  template <class Fill>
  FPET_DEVICE void start(Fill&& fill) {
    oldest = 0;
    for (int s = 0; s + 1 < stages; ++s) {
      fill(base + s * stage_bytes);
      copy_async_commit();
    }
  }
  template <class Fill>
  FPET_DEVICE const char* next(Fill&& fill) {
    if (stages == 2) {
      copy_async_wait<0>();
    } else if (stages == 3) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<2>();
    }
    __syncthreads();
    fill(base + (oldest ? oldest - 1 : stages - 1) * stage_bytes);
    copy_async_commit();  // also where nothing was left to fill: waiting counts groups
    const char* stage = base + oldest * stage_bytes;
    oldest = oldest + 1 == stages ? 0 : oldest + 1;
    return stage;
  }
};

}  // namespace cuda
}  // namespace fpet
