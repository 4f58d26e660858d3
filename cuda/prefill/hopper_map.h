#pragma once

#include "prefill/hopper_task.h"

// Descriptions of K and V for the copy engine of sm_90, and whether a call can have them.
namespace quantattn::cuda {

// Rows (tokens) of a box: those of a key tile, or of a page where pages are smaller; 0 where a key tile of `tile_keys` keys
// cannot be made of whole boxes.
int choose_box_rows(const PrefillTask& task, int tile_keys);

// Describes K or V of a task, in boxes of so many tokens of one head. False where strides or alignment do not allow it, or
// where the driver offers no such description.
bool encode_map(CUtensorMap& map, const PrefillTask& task, const CodeAddresses& codes, const HopperInstance& instance,
                int box_rows);

}  // namespace quantattn::cuda
