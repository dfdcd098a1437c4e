"""A `.tflite` file that runs like the network it was made from."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.export.sandbox import check_model
from oneshot_ednas.measure import find_runtime, open_interpreter


class TfliteNetwork(nn.Module):
    """Runs a file with one image input in the TFLite interpreter, image by image.

    Images are quantized and the outputs dequantized as the file says, so its outputs can be
    scored as a network's.
    """

    def __init__(self, source: Path | str | bytes, *, kernels: str = "default") -> None:
        """Open the file.

        Args:
            source: a file, which is tried in a process of its own first, see `check_model`; or the
                bytes of one that this process has made.
            kernels: `default` or `builtin`, see `oneshot_ednas.measure.open_interpreter`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if no interpreter is installed, it cannot run the file, or that has other
                inputs.
        """
        super().__init__()
        if not isinstance(source, bytes):
            find_runtime()
            path, source = Path(source), Path(source).read_bytes()
            check_model(source, name=str(path), kernels=kernels)
        self.interpreter = open_interpreter(source, kernels=kernels)
        inputs = self.interpreter.get_input_details()
        if len(inputs) != 1 or len(inputs[0]["shape"]) != 4:
            raise ValueError(f"expected one image as input, got {len(inputs)} inputs")
        self._input, self._outputs = inputs[0], self.interpreter.get_output_details()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the file takes."""
        _, height, width, _ = self._input["shape"]
        return int(height), int(width)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> dict[str, Float[Tensor, "batch out height2 width2"]]:
        """Maps by output name, dequantized."""
        rows = [self._invoke(image) for image in images.detach().cpu().numpy()]
        return {
            name: torch.from_numpy(np.stack([row[name] for row in rows])).to(images.device)
            for name in rows[0]
        }

    def _invoke(self, image: np.ndarray) -> dict[str, np.ndarray]:
        scale, zero_point = self._input["quantization"]
        limits = np.iinfo(self._input["dtype"])
        # 8-bit pixels that were scaled to -1..1 lie half way between two integers; rounded up, each
        # is the pixel again. The thousandth is for the rounding of `scale`.
        whole = np.clip(np.floor(image / scale + 0.501) + zero_point, limits.min, limits.max)
        batch = whole.astype(self._input["dtype"]).transpose(1, 2, 0)[None]
        self.interpreter.set_tensor(self._input["index"], batch)
        self.interpreter.invoke()
        maps = {}
        for detail in self._outputs:
            scale, zero_point = detail["quantization"]
            values = self.interpreter.get_tensor(detail["index"])[0].astype(np.float32)
            maps[detail["name"]] = (scale * (values - zero_point)).transpose(2, 0, 1)
        return maps
