#pragma once

#include <cuda.h>

#include "prefill/task.h"

// What the host hands to the prefill kernel of sm_90a.
namespace quantattn::cuda {

// How far blocks of channels and groups of eight tokens are apart in a tile in shared memory, in units of 16 bytes.
struct AtomStrides {
  uint32_t block, group;
};

// The boxes of which the copy engine makes a tile, each in one page.
struct HopperBoxes {
  int rows_log2;    // tokens of a box
  int across_log2;  // boxes that hold the channels of a token
  AtomStrides strides;
};

struct HopperTask {
  CUtensorMap k_map, v_map;  // coordinates of a box: channel, token in page, head * head_step, 0, page
  int k_head_step, v_head_step;
  HopperBoxes boxes;
  PrefillTask prefill;
};

// One compiled kernel.
struct HopperInstance {
  int head_dim;                    // padded
  int block_rows;                  // of a row tile
  int tile_keys;                   // of a key tile
  int box_columns, box_row_bytes;  // of a box of one block of channels
  int threads, shared_bytes;
  void (*entry)(HopperTask);
};

}  // namespace quantattn::cuda
