"""A detector as an ONNX file of plain operations.

TensorRT-RTX has no RoiAlign, NonMaxSuppression and NonZero. The file does without them:

- RoIAlign is two matrix products with weights computed from the regions (`boxes.sampling`).
- Non-maximum suppression is a fixed point of matrix products (`boxes.nms`), unrolled. The output
  `unsettled` counts boxes that the last round still changed: 0 proves the greedy answer.

Inputs: `images` float32 [1, 3, H, W], normalized, and `extent` float32 [1, 2], height and width of
the image on that canvas. Outputs: `boxes` [1, D, 4] on the canvas, `scores` [1, D], `labels` int64
[1, D] (-1 in unused rows) and `unsettled` [1].

`to_onnx(standard=True)` writes the same net with RoiAlign and NonMaxSuppression nodes: a reference
that ONNX Runtime runs, with which the file is compared.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from rtresnet.core.detector_preprocess import INPUTS, OUTPUTS, STRIDE
from rtresnet.detection import boxes
from rtresnet.detection.net import SAMPLES, Align, Detector, Proposals, Select
from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import OPSET, NodeWriter
from rtresnet.onnxlib import metadata


def to_onnx(net: Detector, *, name: str, standard: bool = False) -> onnx.ModelProto:
    """Write a detector whose `spec` has a canvas.

    Args:
        net: float32, on the CPU.
        name: The graph's name, shown by viewers.
        standard: Write RoiAlign and NonMaxSuppression nodes, which TensorRT-RTX does not build.

    Returns:
        A checked model, opset 18, with every shape inferred.

    Raises:
        TypeError: The net has an operation that this writer does not know.
    """
    spec = net.spec
    assert spec.canvas is not None
    graph = fold(net)
    writer = (StandardWriter if standard else DetectorWriter)(spec.canvas)
    modules = dict(graph.named_modules())
    tensors: dict[fx.Node, Any] = {}
    names = iter(INPUTS)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            tensors[node] = next(names)
        elif node.op == "call_module":
            module = modules[node.target]
            inputs = [tensors[argument] for argument in node.args]
            if isinstance(module, Proposals | Align | Select):
                tensors[node] = writer.write_boxes(node.target, module, inputs)
            elif not isinstance(module, nn.Dropout):
                writer.write(node.target, module, inputs)
                tensors[node] = node.target
            else:
                tensors[node] = inputs[0]
        elif node.op == "call_function" and node.target is operator.getitem:
            tensors[node] = tensors[node.args[0]][node.args[1]]
        elif node.op == "output":
            for tensor, output in zip(tensors[node.args[0]], OUTPUTS, strict=True):
                writer.rename_output(tensor, output)
        else:
            raise TypeError(f"no ONNX form for {node.op} {node.target}")
    model = _model(net, writer, name)
    if graph.meta.get(metadata.NORM_STATISTICS.key):
        metadata.NORM_STATISTICS.set(model, graph.meta[metadata.NORM_STATISTICS.key])
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=not standard, data_prop=True)


def _model(net: Detector, writer: DetectorWriter, name: str) -> onnx.ModelProto:
    """Return the model of the nodes that were written, with its inputs and outputs."""
    spec = net.spec
    assert spec.canvas is not None
    height, width = spec.canvas
    count = min(spec.detections, net.classes * min(spec.regions, spec.candidates))
    shapes: dict[str, tuple[int, list[int]]] = {
        "boxes": (TensorProto.FLOAT, [1, count, 4]),
        "scores": (TensorProto.FLOAT, [1, count]),
        "labels": (TensorProto.INT64, [1, count]),
        "unsettled": (TensorProto.FLOAT, [1]),
    }
    return helper.make_model(
        helper.make_graph(
            writer.nodes,
            name,
            [
                helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, height, width]),
                helper.make_tensor_value_info("extent", TensorProto.FLOAT, [1, 2]),
            ],
            [helper.make_tensor_value_info(n, *shapes[n]) for n in OUTPUTS],
            writer.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="rtresnet",
    )


class DetectorWriter(NodeWriter):
    """Writes the three modules that work on boxes; the arithmetic is that of `boxes.py`.

    Args:
        canvas: Height and width of the input, in pixels.
    """

    def __init__(self, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = canvas[0] // STRIDE, canvas[1] // STRIDE
        self.scope = ""

    def write_boxes(self, name: str, module: nn.Module, inputs: Sequence[str]) -> Any:
        """Add the nodes of `Proposals`, `Align` or `Select`; returns their output tensors."""
        self.scope = name
        if isinstance(module, Proposals):
            return self._proposals(module, *inputs)
        if isinstance(module, Align):
            return self._align(module, *inputs)
        assert isinstance(module, Select)
        return self._select(module, *inputs)

    def op(self, op: str, name: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node SCOPE.NAME; inputs that are not names become constants.

        Returns:
            Its output tensor.
        """
        full = f"{self.scope}.{name}"
        tensors = [
            tensor if isinstance(tensor, str) else self.value(f"{full}.{index}", tensor)
            for index, tensor in enumerate(inputs)
        ]
        self.node(op, full, tensors, **attributes)
        return full

    def value(self, name: str, value: Any) -> str:
        """Add a constant: floats as float32, whole numbers as int64."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def cut(self, name: str, tensor: str, start: int, end: int, axis: int) -> str:
        """Slice one axis."""
        return self.op("Slice", name, tensor, [start], [end], [axis])

    def cast(self, name: str, tensor: str) -> str:
        """Convert to float32."""
        return self.op("Cast", name, tensor, to=TensorProto.FLOAT)

    def decode(
        self, offsets: str, centre: Any, size: Any, extent: str, std: Sequence[float]
    ) -> str:
        """Write `boxes.decode` and `boxes.clip`: offsets [..., 4] to boxes [..., 4].

        Args:
            offsets: Tensor.
            centre: Tensor or array, [..., 2].
            size: As `centre`.
            extent: Height and width [1, 2].
            std: The offsets are multiplied by it.
        """
        if tuple(std) != (1, 1, 1, 1):
            offsets = self.op("Mul", "scaled", offsets, np.array(std, np.float32))
        shift = self.cut("shift", offsets, 0, 2, -1)
        growth = self.cut("growth", offsets, 2, 4, -1)
        middle = self.op("Add", "centre", self.op("Mul", "moved", shift, size), centre)
        growth = self.op("Min", "growth.limited", growth, np.float32(boxes.LARGEST_LOG))
        half = self.op("Mul", "half", self.op("Exp", "exp", growth), size)
        half = self.op("Mul", "half.size", half, np.float32(0.5))
        low = self.op("Sub", "low", middle, half)
        high = self.op("Add", "high", middle, half)
        corners = self.op("Concat", "corners", low, high, axis=-1)
        limits = self.op("Gather", "limits", extent, [1, 0, 1, 0], axis=1)
        positive = self.op("Max", "positive", corners, np.float32(0))
        return self.op("Min", "clipped", positive, limits)

    def sides(self, name: str, rows: str) -> tuple[str, str, str, str, str]:
        """Return x1, y1, x2, y2 and the area of boxes, each [..., 1]."""
        x1, y1, x2, y2 = (
            self.cut(f"{name}.{side}", rows, index, index + 1, -1)
            for index, side in enumerate(("x1", "y1", "x2", "y2"))
        )
        width = self.op("Sub", f"{name}.width", x2, x1)
        height = self.op("Sub", f"{name}.height", y2, y1)
        return x1, y1, x2, y2, self.op("Mul", f"{name}.area", width, height)

    def nms(
        self, rows: str, count: int, groups: int, threshold: float, rounds: int
    ) -> tuple[str, str]:
        """Write `boxes.nms` of sorted boxes [groups, count, 4].

        Returns:
            Mask of the boxes that stay, float32 [groups, 1, count], and how many are open [].
        """
        x1, y1, x2, y2, area = self.sides("nms", rows)
        across = {
            side: self.op("Transpose", f"nms.{name}.across", side, perm=[0, 2, 1])
            for side, name in ((x1, "x1"), (y1, "y1"), (x2, "x2"), (y2, "y2"), (area, "area"))
        }
        lengths = []
        for axis, low, high in (("x", x1, x2), ("y", y1, y2)):
            start = self.op("Max", f"nms.{axis}.start", low, across[low])
            end = self.op("Min", f"nms.{axis}.end", high, across[high])
            length = self.op("Sub", f"nms.{axis}.length", end, start)
            lengths.append(self.op("Max", f"nms.{axis}.shared", length, np.float32(0)))
        shared = self.op("Mul", "nms.shared", *lengths)
        both = self.op("Add", "nms.both", area, across[area])
        union = self.op(
            "Max", "nms.union", self.op("Sub", "nms.sum", both, shared), np.float32(1e-9)
        )
        overlap = self.op("Greater", "nms.overlap", self.op("Div", "nms.iou", shared, union),
                          np.float32(threshold))  # fmt: skip
        index = np.arange(count, dtype=np.float32)
        later = self.op("Less", "nms.later", index[:, None], index[None])
        matrix = self.cast("nms.matrix", self.op("And", "nms.suppresses", overlap, later))
        keep = self.value(f"{self.scope}.nms.all", np.ones((groups, 1, count), np.float32))
        before = keep
        for number in range(rounds):
            before = keep
            hits = self.op("MatMul", f"nms.{number}.hits", keep, matrix)
            free = self.op("Less", f"nms.{number}.free", hits, np.float32(0.5))
            keep = self.cast(f"nms.{number}.keep", free)
        changes = self.op("Abs", "nms.changes", self.op("Sub", "nms.difference", keep, before))
        return keep, self.op("ReduceSum", "nms.unsettled", changes, keepdims=0)

    def _proposals(self, module: Proposals, scores: str, offsets: str, extent: str) -> list[str]:
        spec, rows, columns = module.spec, self.rows, self.columns
        kinds = 3 * len(spec.anchors)
        total = rows * columns * kinds
        flat = self.op("Transpose", "scores.last", scores, perm=[0, 2, 3, 1])
        flat = self.op("Reshape", "scores.flat", flat, [total])
        steps = self.op("Reshape", "offsets.kinds", offsets, [kinds, 4, rows, columns])
        steps = self.op("Transpose", "offsets.last", steps, perm=[2, 3, 0, 1])
        steps = self.op("Reshape", "offsets.flat", steps, [total, 4])
        base = boxes.anchors(rows, columns, STRIDE, spec.anchors, spec.anchor_offset)
        size = base[:, 2:] - base[:, :2]
        centre = base[:, :2] + size / 2
        decoded = self.decode(steps, centre.numpy(), size.numpy(), extent, (1, 1, 1, 1))
        area = self.op("Reshape", "area.flat", self.sides("all", decoded)[-1], [total])
        valid = self.op("Greater", "valid", area, np.float32(0))
        ranked = self.op("Where", "ranked", valid, flat, np.float32(-1e4))
        count = min(spec.candidates, total)
        _, order = self.topk("best", ranked, count, axis=0)
        candidates = self.op("Gather", "candidates", decoded, order, axis=0)
        grouped = self.op("Unsqueeze", "candidates.group", candidates, [0])
        assert module.rounds is not None
        keep, unsettled = self.nms(grouped, count, 1, spec.region_iou, module.rounds)
        keep = self.op("Reshape", "keep", keep, [count])
        rank = self.op("Mul", "rank", keep, np.arange(count, 0, -1, dtype=np.float32))
        regions = min(spec.regions, count)
        values, order = self.topk("first", rank, regions, axis=0)
        chosen = self.op("Gather", "regions.any", candidates, order, axis=0)
        used = self.cast("used.float", self.op("Greater", "used", values, np.float32(0)))
        used = self.op("Reshape", "used.column", used, [regions, 1])
        self.regions = regions
        return [self.op("Mul", "regions", chosen, used), unsettled]

    def topk(self, name: str, values: str, count: int, axis: int) -> tuple[str, str]:
        """Return the `count` largest along an axis, from high to low, and their int64 indices."""
        full = f"{self.scope}.{name}"
        size = self.value(f"{full}.count", [count])
        outputs = [f"{full}.values", f"{full}.indices"]
        self.nodes.append(
            helper.make_node(
                "TopK", [values, size], outputs, name=full, axis=axis, largest=1, sorted=1
            )
        )
        return outputs[0], outputs[1]

    def sampling(self, axis: str, low: str, high: str, length: int, bins: int) -> str:
        """Write `boxes.sampling`: weights [R, bins, length] of one axis from its ends [R, 1]."""
        count = bins * SAMPLES
        steps = (torch.arange(count) + 0.5) / count
        reach = self.op("Sub", f"grid.{axis}.reach", high, low)
        at = self.op("Mul", f"grid.{axis}.steps", reach, steps.numpy()[None])
        at = self.op("Add", f"grid.{axis}.at", at, low)
        above = self.op("GreaterOrEqual", f"grid.{axis}.above", at, np.float32(-1))
        below = self.op("LessOrEqual", f"grid.{axis}.below", at, np.float32(length))
        inside = self.cast(f"grid.{axis}.inside.float",
                           self.op("And", f"grid.{axis}.inside", above, below))  # fmt: skip
        at = self.op("Max", f"grid.{axis}.at.low", at, np.float32(0))
        at = self.op("Min", f"grid.{axis}.at.high", at, np.float32(length - 1))
        at = self.op("Unsqueeze", f"grid.{axis}.at.column", at, [2])
        pixels = np.arange(length, dtype=np.float32)[None, None]
        distance = self.op("Abs", f"grid.{axis}.distance",
                           self.op("Sub", f"grid.{axis}.from", at, pixels))  # fmt: skip
        hats = self.op("Sub", f"grid.{axis}.hat", np.float32(1), distance)
        hats = self.op("Max", f"grid.{axis}.hats", hats, np.float32(0))
        mask = self.op("Unsqueeze", f"grid.{axis}.mask", inside, [2])
        hats = self.op("Mul", f"grid.{axis}.masked", hats, mask)
        hats = self.op("Reshape", f"grid.{axis}.bins", hats, [-1, bins, SAMPLES, length])
        return self.op("ReduceMean", f"grid.{axis}.mean", hats, [2], keepdims=0)

    def _align(self, module: Align, features: str, regions: str) -> str:
        rows, columns, bins = self.rows, self.columns, module.bins
        scaled = self.op("Mul", "grid.scaled", regions, np.float32(1 / STRIDE))
        ends = self.op("Sub", "grid.ends", scaled, np.float32(0.5))
        x1, y1, x2, y2 = (
            self.cut(f"grid.{side}", ends, index, index + 1, 1)
            for index, side in enumerate(("x1", "y1", "x2", "y2"))
        )
        down = self.sampling("y", y1, y2, rows, bins)
        along = self.sampling("x", x1, x2, columns, bins)
        wide = columns >= rows
        first, second = (along, down) if wide else (down, along)
        longer, shorter = (columns, rows) if wide else (rows, columns)
        longer_first = self.op("Transpose", "features", features,
                               perm=[3, 0, 1, 2] if wide else [2, 0, 1, 3])  # fmt: skip
        flat = self.op("Reshape", "features.flat", longer_first, [longer, -1])
        weights = self.op("Reshape", "lines.weights", first, [-1, longer])
        lines = self.op("MatMul", "lines", weights, flat)
        lines = self.op("Reshape", "lines.regions", lines, [self.regions, bins, -1, shorter])
        weights = self.op("Transpose", "crops.weights.across", second, perm=[0, 2, 1])
        weights = self.op("Unsqueeze", "crops.weights", weights, [1])
        crops = self.op("MatMul", "crops", lines, weights)
        return self.op("Transpose", "crops.planes", crops,
                       perm=[0, 2, 3, 1] if wide else [0, 2, 1, 3])  # fmt: skip

    def _select(
        self, module: Select, logits: str, offsets: str, regions: str, extent: str, unsettled: str
    ) -> list[str]:
        spec, count, classes = module.spec, self.regions, module.classes
        x1, y1, x2, y2, area = self.sides("region", regions)
        real = self.cast("real.float", self.op("Greater", "real", area, np.float32(0)))
        chances = self.op("Softmax", "softmax", logits, axis=1)
        chances = self.cut("objects", chances, 1, classes + 1, 1)
        chances = self.op("Mul", "chances", chances, real)
        steps = self.op("Reshape", "offsets.classes", offsets, [count, classes, 4])
        low = self.op("Concat", "region.low", x1, y1, axis=1)
        high = self.op("Concat", "region.high", x2, y2, axis=1)
        size = self.op("Sub", "region.size", high, low)
        half = self.op("Mul", "region.half", size, np.float32(0.5))
        centre = self.op("Unsqueeze", "region.centre.group",
                         self.op("Add", "region.centre", low, half), [1])  # fmt: skip
        size = self.op("Unsqueeze", "region.size.group", size, [1])
        decoded = self.decode(steps, centre, size, extent, boxes.REGION_STD)
        decoded = self.op("Transpose", "by_class", decoded, perm=[1, 0, 2])
        flat = self.op("Reshape", "by_class.flat", decoded, [classes * count, 4])
        chances = self.op("Transpose", "chances.by_class", chances, perm=[1, 0])
        chances, order = self.topk("sorted", chances, count, axis=1)
        first = np.arange(classes, dtype=np.int64)[:, None] * count
        order = self.op("Reshape", "order.flat", self.op("Add", "order", order, first),
                        [classes * count])  # fmt: skip
        flat = self.op("Gather", "boxes.sorted", flat, order, axis=0)
        grouped = self.op("Reshape", "boxes.classes", flat, [classes, count, 4])
        keep, changed = self.nms(grouped, count, classes, spec.class_iou, spec.rounds)
        keep = self.op("Reshape", "keep", keep, [classes, count])
        likely = self.op("Greater", "likely", chances, np.float32(spec.least_score))
        masked = self.op("Mul", "kept", chances, keep)
        masked = self.op("Mul", "kept.likely", masked, self.cast("likely.float", likely))
        masked = self.op("Reshape", "kept.flat", masked, [classes * count])
        number = min(spec.detections, classes * count)
        best, order = self.topk("best", masked, number, axis=0)
        valid = self.op("Greater", "valid", best, np.float32(0))
        label = self.op("Div", "label", order, np.int64(count))
        labels = self.op("Where", "labels.used", valid, label, np.int64(-1))
        used = self.op("Reshape", "used", self.cast("used.float", valid), [number, 1])
        picked = self.op(
            "Mul", "picked", self.op("Gather", "picked.any", flat, order, axis=0), used
        )
        total = self.op("Add", "total", unsettled, changed)
        return [
            self.op("Unsqueeze", "boxes", picked, [0]),
            self.op("Unsqueeze", "scores", best, [0]),
            self.op("Unsqueeze", "labels", labels, [0]),
            self.op("Reshape", "unsettled", total, [1]),
        ]


class StandardWriter(DetectorWriter):
    """The same net with ONNX's RoiAlign and NonMaxSuppression."""

    def nms(
        self, rows: str, count: int, groups: int, threshold: float, rounds: int
    ) -> tuple[str, str]:
        """Write the standard operator; see `DetectorWriter.nms`. It always converges."""
        scores = np.broadcast_to(
            np.arange(count, 0, -1, dtype=np.float32), (groups, 1, count)
        ).copy()
        chosen = self.op(
            "NonMaxSuppression", "nms", rows, scores, np.array(count, np.int64),
            np.float32(threshold),
        )  # fmt: skip
        group = self.op("Gather", "nms.group", chosen, 0, axis=1)
        row = self.op("Gather", "nms.row", chosen, 2, axis=1)
        flat = self.op("Add", "nms.flat", self.op("Mul", "nms.first", group, count), row)
        used = self.op("Shape", "nms.shape", flat)
        one = numpy_helper.from_array(np.ones(1, np.float32))
        ones = self.op("ConstantOfShape", "nms.ones", used, value=one)
        keep = self.op("ScatterElements", "nms.scattered", np.zeros(groups * count, np.float32),
                       flat, ones, axis=0)  # fmt: skip
        keep = self.op("Reshape", "nms.keep", keep, [groups, 1, count])
        return keep, self.value(f"{self.scope}.nms.settled", np.float32(0))

    def _align(self, module: Align, features: str, regions: str) -> str:
        images = np.zeros(self.regions, np.int64)
        return self.op(
            "RoiAlign", "crops", features, regions, images, output_height=module.bins,
            output_width=module.bins, sampling_ratio=SAMPLES, spatial_scale=1 / STRIDE,
            mode="avg", coordinate_transformation_mode="half_pixel",
        )  # fmt: skip
