"""The list: each mutation is one wrong edit that a suite worth having turns red on.

An anchor is exact text that stands once in its file; one that is gone is an error, so the list follows the code.
"""

from __future__ import annotations

from mutation.batch_mutations import BATCH_MUTATIONS
from mutation.cuda_decode_mutations import CUDA_DECODE_MUTATIONS
from mutation.cuda_prefill_mutations import CUDA_PREFILL_MUTATIONS
from mutation.interface_mutations import INTERFACE_MUTATIONS
from mutation.kernel_mutations import KERNEL_MUTATIONS
from mutation.offset_mutations import OFFSET_MUTATIONS

MUTATIONS = (
    *KERNEL_MUTATIONS,
    *BATCH_MUTATIONS,
    *INTERFACE_MUTATIONS,
    *OFFSET_MUTATIONS,
    *CUDA_DECODE_MUTATIONS,
    *CUDA_PREFILL_MUTATIONS,
)
