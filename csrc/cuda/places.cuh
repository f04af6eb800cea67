// Places in the kernels of short grids whose passes are counted (benchmarks/count_instructions.py). In a build with FPET_COUNT each leaves its
// number in the machine code; the emulator counts how often a warp passes it; other builds hold nothing of it. Instructions belong to the
// last place before them, so there is one where a loop begins and one behind it.
#pragma once

namespace fpet {
namespace cuda {
namespace place {

enum Place : int {
  other = 1,  // what is not named below
  // merge_short
  fetch_ahead,
  positions,
  weights,
  strips,
  heads,
  strips_summed,
  strips_kept,
  ranked,
  matched,
  merged_row,
  merged_source,
  merged_written,
  // image_gradient
  image,
  tail_of_image,
  steps,
  step_products,
  step_rows,
  steps_done,
  keys,
  keys_loaded,
  matrix,
  matrices_loaded,
  // products of image_gradient, and what is done with each behind it
  units,
  units_done,
  refined,
  refined_done,
  scores,
  scores_done,
  of_sources,
  of_sources_done,
  of_destinations,
  of_destinations_done,
  of_units,
  of_units_done,
  of_up,
  of_up_done,
  of_down,
  of_down_done,
  of_keys,
  of_keys_done,
  norms,
  norms_done
};

}  // namespace place
}  // namespace cuda
}  // namespace fpet
