#pragma once

// Attention over a quantised KV cache. See docs/cpp.md for a first program.
#include "quantattn/alibi.h"
#include "quantattn/api.h"
#include "quantattn/decode.h"
#include "quantattn/error.h"
#include "quantattn/hybrid.h"
#include "quantattn/kv_cache.h"
#include "quantattn/kv_format.h"
#include "quantattn/merge.h"
#include "quantattn/prefill.h"
#include "quantattn/quantize.h"
#include "quantattn/runtime.h"
#include "quantattn/types.h"
