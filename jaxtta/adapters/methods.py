"""The methods that have a name: what makes them, and with which optimiser."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from jaxtta.adapters.base import Adapter, Preset
from jaxtta.adapters.batclip import BATCLIP_PRESETS, batclip
from jaxtta.adapters.clipartt import CLIPARTT_PRESETS, clipartt
from jaxtta.adapters.deyo import DEYO_PRESETS, deyo
from jaxtta.adapters.eata import EATA_PRESETS, EATA_SETTINGS, eta
from jaxtta.adapters.lame import lame
from jaxtta.adapters.mgtta import mgtta
from jaxtta.adapters.mint import MINT_PRESETS, mint
from jaxtta.adapters.mta import mta
from jaxtta.adapters.roid import ROID_PRESETS, roid
from jaxtta.adapters.rotta import ROTTA_PRESETS, rotta
from jaxtta.adapters.sar import SAR_PRESETS, sar
from jaxtta.adapters.stata import stata
from jaxtta.adapters.t3a import t3a
from jaxtta.adapters.tda import tda
from jaxtta.adapters.tent import TENT_PRESETS, tent
from jaxtta.adapters.tnt.adapter import tnt
from jaxtta.adapters.tpt import TPT_OPTIMIZER, tpt
from jaxtta.adapters.transclip import transclip
from jaxtta.adapters.vte import vte
from jaxtta.adapters.watt import WATT_PRESETS, watt
from jaxtta.adapters.zero import zero
from jaxtta.adapters.zero_shot import zero_shot


class Method(NamedTuple):
    """How a method is made.

    Attributes:
        make: `make(model, task, **settings)`; its keywords are its settings.
        presets: the papers' optimisers by benchmark; empty for a method that has none.
        settings: the papers' settings by benchmark, where they are not the defaults.
    """

    make: Callable[..., Adapter]
    presets: Mapping[str, Preset] = {}
    settings: Mapping[str, Mapping[str, Any]] = {}


def _one_preset(optimizer: partial, batch_size: int) -> dict[str, Preset]:
    """The same settings for every benchmark."""
    return dict.fromkeys(TENT_PRESETS, Preset(optimizer, batch_size))


_ETA_SETTINGS = {name: {"similarity": own["similarity"]} for name, own in EATA_SETTINGS.items()}

METHODS = {
    "zero_shot": Method(zero_shot),
    "tent": Method(tent, TENT_PRESETS),
    "batclip": Method(batclip, BATCLIP_PRESETS),
    "tnt": Method(tnt),
    "mgtta": Method(mgtta),
    # entropy with filters; eata needs clean images, which no text can say
    "sar": Method(sar, SAR_PRESETS),
    "eta": Method(eta, EATA_PRESETS, _ETA_SETTINGS),
    "deyo": Method(deyo, DEYO_PRESETS),
    "roid": Method(roid, ROID_PRESETS),
    "rotta": Method(rotta, ROTTA_PRESETS),
    # in many views of one image
    "zero": Method(zero),
    "vte": Method(vte),
    "mta": Method(mta),
    "tpt": Method(tpt, _one_preset(TPT_OPTIMIZER, 1)),
    "ctpt": Method(partial(tpt, dispersion=20.0), _one_preset(TPT_OPTIMIZER, 1)),
    # without training
    "tda": Method(tda),
    "lame": Method(lame),
    "t3a": Method(t3a),
    "stata": Method(stata),
    "transclip": Method(transclip),
    # anew for every batch
    "mint": Method(mint, MINT_PRESETS),
    "clipartt": Method(clipartt, CLIPARTT_PRESETS),
    "watt": Method(watt, WATT_PRESETS),
}
