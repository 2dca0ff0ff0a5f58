"""Where a step's time goes: kinds of kernels, overlap, idle time."""

import pytest

from benchmarks.step_costs import as_text, busy_us, kind_of, summarise

OURS = {"_norm_fwd", "_flash_fwd"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matmuls"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matmuls"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("Memcpy DtoD (Device -> Device)", "memory copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "elementwise and other"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("_norm_fwd", "_norm_fwd"),
        ("_flash_fwd", "_flash_fwd"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name, OURS) == kind


def test_overlapping_work_is_busy_once_and_the_rest_of_the_step_is_idle() -> None:
    spans = [
        ("nvjet_a", 0.0, 1000.0),
        ("_norm_fwd", 500.0, 1500.0),
        ("nvjet_b", 3000.0, 4000.0),
        ("_norm_fwd", 3100.0, 3200.0),
    ]
    assert busy_us(spans) == 2500.0
    summary = summarise(spans, 0.005, OURS)
    assert summary["busy_ms"] == 2.5 and summary["idle_ms"] == pytest.approx(2.5)
    assert summary["kinds"] == {
        "matmuls": {"ms": 2.0, "calls": 2},
        "_norm_fwd": {"ms": pytest.approx(1.1), "calls": 2},
    }
    assert "idle 2.5" in as_text(summary)
