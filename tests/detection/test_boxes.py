"""Box arithmetic, compared with loops and ONNX Runtime's RoiAlign."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rtresnet.detection import boxes


def random_boxes(count: int, seed: int = 0, side: float = 100) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, side, (count, 2))
    rows = np.concatenate([corners, corners + rng.uniform(1, side / 2, (count, 2))], 1)
    return torch.tensor(rows, dtype=torch.float32)


def greedy(rows: torch.Tensor, threshold: float) -> list[int]:
    """Apply textbook non-maximum suppression to sorted boxes."""
    kept: list[int] = []
    for i in range(len(rows)):
        if all(boxes.iou(rows[i : i + 1], rows[j : j + 1]).item() <= threshold for j in kept):
            kept.append(i)
    return kept


def test_iou_known_boxes() -> None:
    first = torch.tensor([[0.0, 0, 2, 2], [0, 0, 0, 0]])
    second = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    expected = [[1 / 7, 1, 0], [0, 0, 0]]
    assert boxes.iou(first, second).tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("std", [(1, 1, 1, 1), boxes.REGION_STD])
def test_decode_inverts_encode(std: tuple[float, ...]) -> None:
    target, start = random_boxes(50, 1), random_boxes(50, 2)
    again = boxes.decode(boxes.encode(target, start, std), start, std)
    assert torch.allclose(again, target, atol=1e-3)


def test_decode_huge_offsets_stay_finite() -> None:
    rows = boxes.decode(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]))
    assert torch.isfinite(rows).all()


def test_clip_cuts_to_the_extent() -> None:
    rows = boxes.clip(torch.tensor([[-5.0, -5, 50, 50]]), torch.tensor([20.0, 30.0]))
    assert rows.tolist() == [[0, 0, 30, 20]]


def test_anchors_have_area_ratio_and_centre() -> None:
    rows = boxes.anchors(2, 3, 16, (32.0, 64.0)).reshape(2, 3, 6, 4)
    width, height = rows[..., 2] - rows[..., 0], rows[..., 3] - rows[..., 1]
    assert torch.allclose(width * height, torch.tensor([32.0**2] * 3 + [64.0**2] * 3))
    assert torch.allclose(height / width, torch.tensor([0.5, 1, 2] * 2))
    assert (rows[1, 2, :, 0] + rows[1, 2, :, 2]).tolist() == pytest.approx([2 * 40] * 6)
    assert (rows[1, 2, :, 1] + rows[1, 2, :, 3]).tolist() == pytest.approx([2 * 24] * 6)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_nms_equals_the_greedy_algorithm(seed: int, threshold: float) -> None:
    rows = random_boxes(150, seed, side=60)
    keep, changed = boxes.nms(rows, threshold)
    assert torch.nonzero(keep)[:, 0].tolist() == greedy(rows, threshold)
    assert changed.item() == 0


def test_nms_too_few_rounds_are_reported() -> None:
    # A chain: each box overlaps the next one only, so the answer needs a round for each of them.
    chain = torch.tensor([[6.0 * i, 0, 6.0 * i + 10, 10] for i in range(30)])
    keep, changed = boxes.nms(chain, 0.2)
    assert keep.tolist() == [float(i % 2 == 0) for i in range(30)] and changed.item() == 0
    _, unfinished = boxes.nms(chain, 0.2, rounds=8)
    assert unfinished.item() > 0
    proven, settled = boxes.nms(chain, 0.2, rounds=32)
    assert settled.item() == 0 and proven.tolist() == keep.tolist()


@pytest.mark.parametrize(("bins", "samples"), [(7, 2), (14, 2), (3, 3)])
def test_roi_align_equals_the_operator(bins: int, samples: int) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    node = helper.make_node(
        "RoiAlign", ["x", "rois", "batch"], ["y"], output_height=bins, output_width=bins,
        sampling_ratio=samples, spatial_scale=1 / 16, mode="avg",
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "oracle",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 12, 17]),
         helper.make_tensor_value_info("rois", TensorProto.FLOAT, ["n", 4]),
         helper.make_tensor_value_info("batch", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, bins, bins])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 5, 12, 17)).astype(np.float32)
    regions = random_boxes(80, 3, side=260).numpy() - 30  # some reach outside of the map
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(
        None, {"x": features, "rois": regions, "batch": np.zeros(len(regions), np.int64)}
    )
    own = boxes.roi_align(torch.tensor(features[0]), torch.tensor(regions), 1 / 16, bins, samples)
    assert np.abs(own.numpy() - expected).max() < 1e-4
