"""The pipeline of an exported student: noise or seeds to images. `export.py` copies this file into every folder."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


class StudentPipeline(DiffusionPipeline):
    """Samples a distilled student; see README.md beside this file."""

    def __init__(self, student: ModelMixin):
        super().__init__()
        self.register_modules(student=student)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        class_labels: Sequence[int] | int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of `batch_size` draws from `generator` or, one each, of `seeds`: that image is the same in any batch.

        class_labels: one for all images or one each, in [0, num_classes) (None: drawn). output_type: "pil"; "np", uint8
        (B, H, W, C); or "pt", float32 (B, C, H, W) in about [-1, 1], not clipped.

        Raises:
            ValueError: For an unknown output_type, labels that do not fit, or PIL images of other than 1 or 3 channels.
        """
        student = self.student
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        channels = student.image_shape[0]
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"images of {channels} channels are no pictures; take output_type='pt'")
        if seeds is not None:
            noise, labels = student.inputs(torch.tensor(list(seeds), dtype=torch.int64, device=student.device))
        else:
            shape = (batch_size, *student.image_shape)
            noise = randn_tensor(shape, generator=generator, device=student.device, dtype=torch.float32)
            labels = self._drawn(batch_size, generator)
        if class_labels is not None:
            labels = self._checked(class_labels, len(noise))
        images = student.generate(noise, labels)
        if output_type != "pt":
            # EDM's rule of bytes, under which the student was measured.
            pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
            images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray(image[:, :, 0] if channels == 1 else image) for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _drawn(self, count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor | None:
        if not self.student.num_classes:
            return None
        first = generator[0] if isinstance(generator, list) else generator
        device = "cpu" if first is None else first.device
        labels = torch.randint(self.student.num_classes, (count,), generator=first, device=device)
        return labels.to(self.student.device)

    def _checked(self, class_labels: Sequence[int] | int, count: int) -> Tensor:
        classes = self.student.num_classes
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=self.student.device).reshape(-1)
        if not classes:
            raise ValueError("this student has no classes; leave class_labels out")
        if len(labels) not in (1, count) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels must be one or {count} numbers from 0 to {classes - 1}, got {class_labels}")
        return labels.expand(count)
