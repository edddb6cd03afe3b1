"""DAM-VP: a trained frame of pixels for each cluster of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting, frozen_backbone
from svp_bench.methods.pixels import frame, frame_pixels, frame_width
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES


class DAMVP(Method):
    """A frame of pixels for each cluster of images, added to the normalised image: x + δ_c(x).

    Huang et al., "Diversity-Aware Meta Visual Prompting", CVPR 2023, arXiv:2303.08138. Before the training, features of
    training images under the frozen backbone are clustered, agglomeratively with average linkage; each cluster gets a
    frame as in VP, from N(0, 1). An image gets the frame of the cluster whose mean is nearest to its features: each
    forward pass begins with a second one of the frozen backbone, in eval mode. Features are the class tokens after the
    final norm, or the mean token of a backbone without. The images are the first of the training split in an order that
    follows from the seed, without augmentation.

    The published distances at which clusters are no longer joined (10 to 31) belong to other backbones; for Vim none is
    published. Without one, clusters are joined until `max_clusters` are left. The frames are not meta-trained on other
    data sets, so this is the variant of the paper without its meta initialisation. As released, the head trains too;
    theirs by SGD. Before `prepare` there is one frame: without training images DAM-VP is VP.

    Trained parameters without the head: clusters · 3 (H W − (H − 2 w) (W − 2 w)) for images of H × W and a frame of
    width w; 69,840 for each cluster at 224 pixels.

    Args:
        max_clusters: Most clusters.
        threshold: Distance from which on clusters are not joined; null: join until `max_clusters` are left.
        samples: Training images that are clustered.
        width: Of the frame in pixels; null: 30 of 224 in proportion to the shorter side.
    """

    identity_at_start = False

    def __init__(
        self,
        max_clusters: int = 8,
        threshold: float | None = None,
        samples: int = 1000,
        width: int | None = None,
    ) -> None:
        check_setting("dam_vp", "max_clusters", max_clusters, 1)
        if threshold is not None:
            check_setting("dam_vp", "threshold", threshold, "positive")
        check_setting("dam_vp", "samples", samples, 1)
        if width is not None:
            check_setting("dam_vp", "width", width, 1)
        self.max_clusters = max_clusters
        self.threshold = threshold
        self.samples = samples
        self.width = width
        self._frames = 1

    def attach(self, model: Backbone) -> None:
        """Build `adapter.delta`, the pixels of one frame, and add the frames to the images.

        Raises:
            ConfigError: If the frame does not fit into the image.
        """
        self._frames = 1
        model.adapter = frames = _Frames(model, frame_width("dam_vp", self.width, model.image_size))
        model.points.on_images(frames.add)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies: to the head alone, as for VP."""
        return name.startswith(HEAD_PREFIXES)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 3 for each pixel of a frame, for each cluster."""
        width = frame_width("dam_vp", self.width, model.image_size)
        return self._frames * model.in_chans * frame_pixels(model.image_size, width)

    def prepare(self, model: Backbone, images: Iterable[Tensor]) -> None:
        """Cluster the features of training images, and build a frame for each cluster.

        Raises:
            ConfigError: If tensors of the backbone train, so that features would change.
        """
        if any(model.get_parameter(name).requires_grad for name in model.own_parameters):
            raise ConfigError(
                "dam_vp needs the features of a frozen backbone; leave out methods that train its tensors"
            )
        frames = _adapter(model)
        found: list[Tensor] = []
        for batch in images:
            found.append(frames.features(batch))
            if sum(map(len, found)) >= self.samples:
                break
        features = torch.cat(found)[: self.samples]
        labels = torch.tensor(self._labels(features), device=features.device)
        means = torch.stack([features[labels == label].mean(0) for label in range(1, 1 + int(labels.max()))])
        self._resize(frames, len(means))
        frames.means.copy_(means)

    def restore(self, model: Backbone, tensors: Mapping[str, Tensor]) -> None:
        """Build as many frames as the checkpoint has."""
        means = tensors.get("adapter.means")
        if means is not None and means.ndim == 2 and 0 < len(means) <= self.max_clusters:
            self._resize(_adapter(model), len(means))

    def _labels(self, features: Tensor) -> list[int]:
        """Return the cluster, 1, 2, …, of each row of features (N, F)."""
        if len(features) < 2:
            return [1] * len(features)
        tree = linkage(features.double().cpu().numpy(), "average")
        labels = None if self.threshold is None else fcluster(tree, self.threshold, "distance")
        if labels is None or labels.max() > self.max_clusters:
            labels = fcluster(tree, self.max_clusters, "maxclust")
        return [int(label) for label in labels]

    def _resize(self, frames: _Frames, count: int) -> None:
        self._frames = count
        old = frames.delta
        frames.delta = nn.Parameter(torch.randn(count, *old.shape[1:]).to(old))
        frames.means = frames.means.new_zeros(count, frames.means.shape[1])


def _adapter(model: Backbone) -> _Frames:
    assert isinstance(model.adapter, _Frames)
    return model.adapter


class _Frames(nn.Module):
    means: Tensor

    def __init__(self, model: Backbone, width: int) -> None:
        super().__init__()
        self.size, self.width = model.image_size, width
        self.delta = nn.Parameter(torch.randn(1, model.in_chans, frame_pixels(self.size, width)))
        self.register_buffer("means", torch.zeros(1, model.embed_dim * max(1, len(model.cls_positions))))
        self._backbone = (model,)  # a tuple: the model must not become a module of its own adapter

    def add(self, images: Tensor) -> Tensor:
        delta: Tensor = self.delta
        if len(self.means) > 1:
            wide = torch.promote_types(images.dtype, torch.float32)
            distances = torch.cdist(self.features(images).to(wide), self.means.to(wide))
            delta = delta[distances.argmin(dim=1)]
        return images + frame(delta, self.size, self.width).to(images.dtype)

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images (B, 3, H, W) under the frozen backbone without a method, (B, F)."""
        (model,) = self._backbone
        with frozen_backbone(model):
            tokens, cls_positions = model.forward_tokens(images)
            return tokens[:, list(cls_positions)].flatten(1) if cls_positions else tokens.mean(dim=1)
