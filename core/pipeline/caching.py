"""Which step cache a job uses: from the request and the model, one for every guidance pass of a section."""

from collections.abc import Callable
from functools import partial

from core.pipeline.magnitudes import Curves, curve_for
from core.request import VideoRequest
from core.weights.profiles import Direction
from diffusers_helper.first_block_cache import FirstBlockCache
from diffusers_helper.magcache import MagCache
from diffusers_helper.step_cache import StepCache
from diffusers_helper.teacache import TeaCache

CACHES: dict[str, type[StepCache]] = {
    "teacache": TeaCache,
    "magcache": MagCache,
    "firstblock": FirstBlockCache,
}

# the section's noise levels, without the 0 at the end → a new cache for one pass
NewCache = Callable[[list[float]], StepCache | None]


def cache_threshold(request: VideoRequest) -> float | None:
    """The threshold really used; None without a cache."""
    if request.cache_kind == "none":
        return None
    given = request.cache_threshold
    return CACHES[request.cache_kind].THRESHOLD if given is None else given


def step_caches(request: VideoRequest, direction: Direction, curves: Curves) -> NewCache:
    """Makes the request's caches. Raises RequestError where the model has not what the cache needs."""
    kind, threshold = request.cache_kind, cache_threshold(request)
    if kind == "none":
        return lambda sigmas: None
    new = partial(CACHES[kind], threshold=threshold, order=request.cache_order)
    if kind == "magcache":
        curve = curve_for(curves, direction)
        return lambda sigmas: new(len(sigmas), ratios=curve.at(sigmas))
    return lambda sigmas: new(len(sigmas))
