// Sums over the tokens that were merged into one, in a fixed order: the forward's merge, and the backward of unmerge.
#pragma once

#include "prepared_keys.cuh"

namespace fpet {
namespace cuda {

struct MergeListsParams {
  Problem q;             // x is what is summed
  const int64_t* match;  // (B, N_A)
  void* tokens;          // (B, M, D)
  void* merged_size;     // (B, M), or null
  bool mean;             // divided by the sum of sizes
  int blocks;            // the rest is filled in by the launcher
  bool aligned;
};

// In forward_long.cu.
CudaStatus launch_merge_lists(MergeListsParams, cudaStream_t);

}  // namespace cuda
}  // namespace fpet
