"""Schedule, sampler, guidance, TeaCache, blending and buckets, each on its own and without a model."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_helper.blending import SectionJoiner, crossfade, to_uint8
from diffusers_helper.buckets import buckets, nearest_bucket, resize_and_center_crop
from diffusers_helper.euler import sample_euler
from diffusers_helper.guidance import guided_velocity
from diffusers_helper.samplers import SAMPLERS
from diffusers_helper.schedule import flow_shift_mu, shifted_sigmas
from diffusers_helper.step_cache import relative_change
from diffusers_helper.teacache import LEAST, POLYNOMIAL, TeaCache, estimated_change
from diffusers_helper.unipc import sample_unipc


class TestSchedule:
    def test_mu_passes_through_its_two_points_and_is_capped(self):
        assert flow_shift_mu(256) == pytest.approx(0.5)
        assert flow_shift_mu(4096) == pytest.approx(1.15)
        assert flow_shift_mu(13_680) == pytest.approx(math.log(7))

    def test_sigmas_fall_from_one_to_zero(self):
        sigmas = shifted_sigmas(25, flow_shift_mu(13_680))
        assert sigmas.shape == (26,) and sigmas.dtype == torch.float32
        assert sigmas[0] == 1 and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()

    def test_shift_formula(self):
        assert shifted_sigmas(2, math.log(7))[1].item() == pytest.approx(7 / 8)


class TestUniPC:
    sigmas = shifted_sigmas(20, 1.0)

    def test_a_constant_prediction_is_the_result(self):
        answer = torch.full((2, 3), 0.25)
        assert torch.equal(sample_unipc(lambda x, sigma: answer, torch.randn(2, 3), self.sigmas), answer)

    def test_one_evaluation_a_step_at_the_schedules_levels(self):
        seen, called = [], []

        def denoise(x, sigma):
            seen.append(sigma)
            return 0.5 * x

        sample_unipc(denoise, torch.ones(1), self.sigmas, lambda i, x0: called.append(i))
        assert seen == self.sigmas[:-1].tolist()
        assert called == list(range(20))

    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    def test_few_steps_work(self, steps):
        result = sample_unipc(lambda x, sigma: 0.9 * x, torch.ones(4), shifted_sigmas(steps, 1.0))
        assert torch.isfinite(result).all()

    @pytest.mark.parametrize(("name", "order"), [("unipc_bh1", 3), ("unipc_bh2", 3), ("euler", 1)])
    def test_converges_with_its_order_to_the_exact_solution(self, name, order):
        """Data N(0, s²): the ideal x0(x, σ) is linear in x, and x keeps its ratio to its spread at σ."""
        s, last = 0.5, 0.05

        def spread(sigma):
            return math.sqrt((1 - sigma) ** 2 * s**2 + sigma**2)

        def denoise(x, sigma):
            return x * (1 - sigma) * s**2 / spread(sigma) ** 2

        errors = []
        for steps in (20, 40, 80):  # even in log σ, so that halving the step halves it everywhere
            levels = torch.logspace(0, math.log10(last), steps, dtype=torch.float64)
            levels = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
            x0 = SAMPLERS[name](denoise, torch.ones(1, dtype=torch.float64), levels)
            errors.append(abs(x0.item() - denoise(spread(last), last)))
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) > order - 0.2  # less what 20 steps lack
        assert order > 1 or math.log2(errors[1] / errors[2]) < 1.2

    def test_the_callback_can_stop_it(self):
        class StopEarlyError(Exception):
            pass

        def stop(i, x0):
            if i == 2:
                raise StopEarlyError

        calls = []
        with pytest.raises(StopEarlyError):
            sample_unipc(lambda x, s: calls.append(s) or x, torch.ones(1), self.sigmas, stop)
        assert len(calls) == 3


class TestSamplers:
    """On data N(0, s²) with an s for each channel, whose exact sample is s · noise."""

    noise = torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(0))
    spread = torch.linspace(0.3, 1.5, 16).view(1, 16, 1, 1)

    def denoise(self, x, sigma):
        return x * (1 - sigma) * self.spread**2 / (((1 - sigma) * self.spread) ** 2 + sigma**2)

    def results(self, steps):
        sigmas = shifted_sigmas(steps, math.log(7))
        return {name: sample(self.denoise, self.noise, sigmas) for name, sample in SAMPLERS.items()}

    def errors(self, steps):
        exact = self.noise * self.spread
        return {name: ((x0 - exact).norm() / exact.norm()).item() for name, x0 in self.results(steps).items()}

    def test_they_meet(self):
        for name, error in self.errors(400).items():
            assert error < (0.02 if name == "euler" else 0.002), name
        few = self.errors(25)
        assert max(few["unipc_bh1"], few["unipc_bh2"]) < few["euler"] < 0.2

    def test_they_differ_on_the_way(self):
        bh1, bh2, euler = self.results(6).values()
        for one, other in [(bh1, bh2), (bh1, euler), (bh2, euler)]:
            assert (one - other).abs().max() > 1e-5

    @pytest.mark.parametrize("steps", [1, 2])
    def test_with_up_to_two_steps_they_are_the_same(self, steps):
        first, *others = self.results(steps).values()
        for other in others:
            assert torch.allclose(first, other, atol=1e-6)

    @pytest.mark.parametrize("name", SAMPLERS)
    @pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
    def test_one_evaluation_a_step_and_the_last_is_the_result(self, name, steps):
        sigmas, told = shifted_sigmas(steps, math.log(20)), []
        result = SAMPLERS[name](self.denoise, self.noise, sigmas, lambda i, x0: told.append((i, x0)))
        assert [i for i, _ in told] == [*range(steps)]
        assert torch.equal(result, told[-1][1]) and torch.isfinite(result).all()
        assert result.dtype == self.noise.dtype and result.shape == self.noise.shape

    @pytest.mark.parametrize("steps", [1, 4, 25])
    def test_euler_is_the_librarys(self, steps):
        sigmas = shifted_sigmas(steps, math.log(3))
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
        assert torch.equal(scheduler.sigmas, sigmas)
        x = self.noise
        for timestep, sigma in zip(scheduler.timesteps, sigmas[:-1].tolist(), strict=True):
            x = scheduler.step((x - self.denoise(x, sigma)) / sigma, timestep, x, return_dict=False)[0]
        assert torch.allclose(sample_euler(self.denoise, self.noise, sigmas), x, atol=1e-5)


class TestGuidance:
    positive, negative = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def test_scale_one_is_the_positive_pass(self):
        assert torch.allclose(guided_velocity(self.positive, self.negative, 1.0, 0.0), self.positive)

    def test_formula(self):
        expected = self.negative + 3 * (self.positive - self.negative)
        assert torch.equal(guided_velocity(self.positive, self.negative, 3.0, 0.0), expected)

    def test_full_rescale_has_the_positive_passs_spread(self):
        velocity = guided_velocity(self.positive, self.negative, 6.0, 1.0)
        assert velocity.std().item() == pytest.approx(self.positive.std().item(), rel=1e-5)

    def test_half_rescale_lies_between(self):
        full = guided_velocity(self.positive, self.negative, 6.0, 1.0)
        none = guided_velocity(self.positive, self.negative, 6.0, 0.0)
        half = guided_velocity(self.positive, self.negative, 6.0, 0.5)
        assert torch.allclose(half, (full + none) / 2, atol=1e-5)


class TestTeaCache:
    def test_polynomial(self):
        assert estimated_change(0.1) == pytest.approx(np.polyval(POLYNOMIAL, 0.1))

    def test_its_least_value(self):
        least = np.polyval(POLYNOMIAL, np.linspace(0, 1, 100_001)).min()
        assert LEAST < least < LEAST + 1e-4
        assert (np.roots(np.polyder(POLYNOMIAL)).real < 1).all()  # it only rises from 1 on

    @pytest.mark.parametrize("threshold", [0.0, 0.05, 0.15, 0.3, 1.0])
    def test_the_decisions_are_those_of_the_rule_though_not_every_change_is_read(
        self, threshold, monkeypatch
    ):
        read = []
        monkeypatch.setattr(
            "diffusers_helper.teacache.relative_change",
            lambda now, before: read.append(1) or relative_change(now, before),
        )
        generator = torch.Generator().manual_seed(0)
        inputs, signal = [], torch.randn(50, generator=generator)
        for _ in range(200):
            inputs.append(signal)
            signal = signal + 0.05 * torch.randn(50, generator=generator)
        expected, accumulated = [True], 0.0
        for before, now in pairwise(inputs[:-1]):
            change = ((now - before).abs().mean() / before.abs().mean()).item()
            accumulated += float(np.polyval(POLYNOMIAL, change))
            expected.append(accumulated >= threshold)
            accumulated = 0.0 if expected[-1] else accumulated
        cache = TeaCache(200, threshold)
        assert [cache.should_compute(signal) for signal in inputs] == [*expected, True]
        assert len(read) <= 198 and (len(read) == 0) == (threshold <= LEAST)

    def test_first_and_last_always_compute(self):
        cache = TeaCache(steps=3, threshold=1e9)
        same = torch.ones(1, 4, 2)
        assert [cache.should_compute(same) for _ in range(3)] == [True, False, True]
        assert cache.computed == [0, 2]

    def test_change_accumulates_until_the_threshold(self):
        # an unchanged input still counts for the polynomial's constant, 0.096 a step
        cache = TeaCache(steps=8, threshold=0.15)
        decisions = [cache.should_compute(torch.ones(1, 4, 2)) for _ in range(7)]
        assert decisions == [True, False, True, False, True, False, True]

    def test_a_large_change_computes_at_once(self):
        cache = TeaCache(steps=10)
        cache.should_compute(torch.ones(1, 4, 2))
        assert cache.should_compute(2 * torch.ones(1, 4, 2))

    def test_a_skipped_step_adds_the_residual(self):
        cache = TeaCache(steps=3)
        cache.store(torch.ones(1, 2, 2), torch.full((1, 2, 2), 5.0))
        assert torch.equal(cache.apply(torch.zeros(1, 2, 2)), torch.full((1, 2, 2), 4.0))


class TestBlending:
    def test_to_uint8_truncates_and_clamps(self):
        pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
        assert to_uint8(pixels).tolist() == [0, 0, 127, 254, 255, 255]

    def test_crossfade_is_linear(self):
        blended = crossfade(torch.zeros(1, 3, 5, 1, 1), torch.ones(1, 3, 5, 1, 1))
        assert blended[0, 0, :, 0, 0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]

    @pytest.mark.parametrize("prepended", [False, True])
    def test_joins_like_one_long_blend(self, prepended):
        """Three sections joined piece by piece equal the plain blend of whole float videos."""
        overlap = 5
        generator = torch.Generator().manual_seed(0)
        sections = [
            torch.rand(1, 3, frames, 2, 2, generator=generator) * 2 - 1 for frames in (overlap, 11, 12)
        ]
        joiner = SectionJoiner(overlap)
        video = None
        for section in sections:
            if prepended:
                joiner.prepend(section)
                pair = (section, video)
            else:
                joiner.append(section)
                pair = (video, section)
            if video is None:
                video = section
                continue
            before, after = pair
            fade = crossfade(before[:, :, -overlap:], after[:, :, :overlap])
            video = torch.cat([before[:, :, :-overlap], fade, after[:, :, overlap:]], dim=2)
        joined = torch.cat(list(joiner.clips(prepended=prepended)), dim=2)
        assert torch.equal(joined, to_uint8(video))


class TestBuckets:
    def test_640_gives_the_official_table(self):
        short = [(416, 960), (448, 864), (480, 832), (512, 768), (544, 704), (576, 672), (608, 640)]
        assert buckets(640) == sorted(short + [(w, h) for h, w in short])

    @pytest.mark.parametrize("resolution", range(256, 961, 32))
    def test_every_resolution_has_sound_buckets(self, resolution):
        pairs = buckets(resolution)
        assert pairs
        for height, width in pairs:
            assert height % 32 == width % 32 == 0
            assert (width, height) in pairs
            assert 0.7 * resolution**2 < height * width <= 0.975 * resolution**2

    @pytest.mark.parametrize(
        ("size", "bucket"),
        [
            ((1080, 1920), (480, 832)),
            ((1920, 1080), (832, 480)),
            ((500, 500), (640, 608)),  # two are equally near; the taller wins
            ((240, 320), (544, 704)),
            ((100, 1000), (416, 960)),
        ],
    )
    def test_nearest(self, size, bucket):
        assert nearest_bucket(*size, 640) == bucket

    def test_an_image_of_the_right_size_is_left_alone(self):
        image = np.zeros((64, 96, 3), np.uint8)
        assert resize_and_center_crop(image, 64, 96) is image

    @pytest.mark.parametrize("size", [(1, 1), (30, 90), (90, 30), (63, 97), (1000, 200)])
    def test_crop_has_the_asked_size_and_keeps_the_centre(self, size):
        image = np.zeros((*size, 3), np.uint8)
        image[size[0] // 2, size[1] // 2] = 255
        cropped = resize_and_center_crop(image, 64, 96)
        assert cropped.shape == (64, 96, 3) and cropped.dtype == np.uint8
        assert cropped[24:40, 38:58].max() > 0
