"""The families of models that there are."""

from __future__ import annotations

from lltk.graph.geometry import Kind
from lltk.models import vae_encoder, wan22, wan_vae
from lltk.models.family import Family

FAMILIES: tuple[Family, ...] = (wan22.FAMILY, wan_vae.FAMILY, vae_encoder.FAMILY)


def family_of(kind: Kind) -> Family:
    """The family whose models become Programs of a kind."""
    (family,) = (family for family in FAMILIES if kind in family.kinds)
    return family
