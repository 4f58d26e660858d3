#pragma once

#include <cuda.h>

#include "prefill/task.h"

// What the host hands to the prefill kernel of sm_90a.
namespace quantattn::cuda {

struct HopperTask {
  CUtensorMap k_map, v_map;  // dimensions: channel, head, token in page, page; boxes of 64 channels of one head and page
  int box_rows;
  PrefillTask prefill;
};

// One compiled kernel.
struct HopperInstance {
  int head_dim;                    // padded
  int block_rows;                  // of a row tile
  int tile_keys;                   // of a key tile
  int box_columns, box_row_bytes;  // of what the copy engine brings at a time
  int threads, shared_bytes;
  void (*entry)(HopperTask);
};

}  // namespace quantattn::cuda
