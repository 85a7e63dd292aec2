"""Generative adversarial networks: a game between two networks, put together from parts.

The parts: the loss and the penalty (src.objectives), augmentation and packing of what the discriminator sees, the two
networks, spectral normalization, and the way the class enters.

References:
    Goodfellow et al. 2014, "Generative adversarial networks", arXiv:1406.2661.
    Lin et al. 2018, "PacGAN: the power of two samples in generative adversarial networks", arXiv:1712.04086: packing.
    Miyato et al. 2018, "Spectral normalization for generative adversarial networks", arXiv:1802.05957.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError, require_number
from src.core.protocols import Styled, Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.networks.conditioning import Conditioning, Verdict
from src.networks.spectral_norm import normalize_spectra
from src.objectives.adversarial import AdversarialLoss, Relativistic, Wasserstein
from src.objectives.augmentation import Augmentation
from src.objectives.penalties import GradientPenalty, NoPenalty, Penalty, judge

__all__ = ["GAN"]


class GAN(nn.Module):
    """A generator that turns N(0, I) into data, and a discriminator that tells the two apart.

    Args:
        spec: the data.
        generator: network from z to data, called as `generator(in_shape=, out_shape=, condition_dim=)`; a tanh follows
            where the data has a range.
        discriminator: network from data to one logit, called likewise.
        conditioning: how the discriminator takes the class; without one the generator is not told either.
        adversarial_loss: what the players minimise.
        penalty: what the discriminator minimises besides.
        augmentation: of what the discriminator sees, real and generated.
        latent_dim: dimensions of z.
        packing: examples that the discriminator sees at a time, all real or all generated, as channels (images) or values
            (vectors) of one: a generator that repeats itself gives itself away.
        spectral_norm: divide every weight matrix of the discriminator by its largest singular value.
        allow_known_bad: take combinations of parts that are known to fail.
    """

    def __init__(
        self,
        spec: DataSpec,
        generator: Callable[..., nn.Module],
        discriminator: Callable[..., nn.Module],
        conditioning: Callable[..., Conditioning],
        adversarial_loss: AdversarialLoss,
        penalty: Penalty,
        augmentation: Augmentation,
        latent_dim: int,
        packing: int,
        spectral_norm: bool,
        allow_known_bad: bool,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_number("model.latent_dim", latent_dim, 1)
        require_number("model.packing", packing, 1)
        augmentation.require(spec)
        self.latent_dim = latent_dim
        self._spec = spec
        self._loss = adversarial_loss
        self._penalty = penalty
        self._augmentation = augmentation
        self._packing = packing
        self._allow_known_bad = allow_known_bad
        packed = (packing * spec.shape[0], *spec.shape[1:])
        self.discriminator = conditioning(network=discriminator, in_shape=packed, spec=spec)
        self.is_conditional = self.discriminator.is_conditional
        if self.is_conditional and packing > 1:
            raise UserError(f"model.packing={packing}: examples of different classes are not packed; set model.packing=1")
        if spectral_norm:
            normalize_spectra(self.discriminator)
        condition_dim = spec.num_classes if self.is_conditional else 0
        self.generator = generator(in_shape=(latent_dim,), out_shape=spec.shape, condition_dim=condition_dim)
        self.has_styles = isinstance(self.generator, Styled)
        if not allow_known_bad:
            self._refuse_known_bad(has_spectral_norm=spectral_norm)

    def players(self) -> tuple[nn.Module, nn.Module]:
        return self.generator, self.discriminator

    def discriminator_loss(self, batch: Batch, *, penalty_scale: float = 1.0, generator: Noise | None = None) -> Terms:
        """The discriminator's loss, one value for each example or pack; the fakes carry no gradient into the generator.

        The parts of the penalty are shown without `penalty_scale`, which weighs them in the loss; at 0 they are left out.
        """
        noise = generator or fresh_noise()
        with torch.no_grad():
            fake = self._pack(self._sample_like(batch, noise))
        real = self._pack(batch.x)
        verdicts: list[Verdict] = []

        def critic(x: Tensor) -> Tensor:
            verdicts.append(self.discriminator(self._augmented(x, noise), batch.condition))
            return verdicts[-1].logit

        is_penalised = penalty_scale > 0
        judged_real = judge(critic, real, is_penalised and self._penalty.of_real)
        judged_fake = judge(critic, fake, is_penalised and self._penalty.of_fake)
        terms = {"logit_real": judged_real.logit.detach(), "logit_fake": judged_fake.logit.detach()}
        loss = self._loss.discriminator(judged_real.logit, judged_fake.logit)
        for name, verdict in zip(("class_real", "class_fake"), tuple(verdicts), strict=True):
            wrong = self._class_loss(verdict, batch.condition)
            loss = loss + self.discriminator.class_weight * wrong.get("class", 0)
            terms |= {name: wrong["class"]} if wrong else {}
        if is_penalised:
            penalties = self._penalty(critic, judged_real, judged_fake, noise)
            loss = loss + penalty_scale * sum(penalties.values(), torch.zeros_like(loss))
            terms |= penalties
        return {"loss": loss, **terms}

    def generator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The generator's loss, one value for each example or pack; its fakes stay attached to it."""
        noise = generator or fresh_noise()
        fake = self._pack(self._sample_like(batch, noise))
        verdict = self.discriminator(self._augmented(fake, noise), batch.condition)
        real = None
        if self._loss.needs_real:
            with torch.no_grad():  # it does not hang on the generator
                real = self.discriminator(self._augmented(self._pack(batch.x), noise), batch.condition).logit
        loss = self._loss.generator(verdict.logit, real)
        wrong = self._class_loss(verdict, batch.condition)
        return {"loss": loss + self.discriminator.class_weight * wrong.get("class", 0), **wrong}

    def logits(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """How real the discriminator finds examples `(B, *event)`, as it sees them: one value for each example or pack."""
        shown = self._augmented(self._pack(x), generator or fresh_noise())
        return self.discriminator(shown, condition if self.is_conditional else None).logit

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        noise = generator or fresh_noise()
        z = noise.normal((n, self.latent_dim), like=next(self.generator.parameters()))
        return self.decode(z, condition, generator=noise)

    def decode(self, z: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """The generator's example of z `(n, latent_dim)`.

        A generator with noise of its own besides z takes it from `generator`, and without one the same for every z.
        """
        if self.has_styles:
            return self.decode_styles(self.styles(z, condition), generator=generator)
        return self._spec.squash(self.generator(z, self._features(condition)))

    def styles(self, z: Tensor, condition: Tensor | None = None, *, truncation: float | None = None) -> Tensor:
        """The generator's styles of z `(n, latent_dim)`, `(n, num_layers, style_dim)`, truncated or as they are."""
        if not isinstance(self.generator, Styled):
            raise NotApplicable("the generator has no styles")
        styles = self.generator.styles(z, self._features(condition))
        return styles if truncation is None else self.generator.truncate(styles, truncation)

    def decode_styles(self, styles: Tensor, *, generator: Noise | None = None) -> Tensor:
        """The generator's example of styles `(n, num_layers, style_dim)`; its noise is as in `decode`."""
        if not isinstance(self.generator, Styled):
            raise NotApplicable("the generator has no styles")
        return self._spec.squash(self.generator.synthesize(styles, generator))

    def refuse_training(self, precision: str, penalty_interval: int) -> None:
        """Raise `UserError` for a way of training that is known to fail with these parts.

        Args:
            precision: as in `trainer.precision`.
            penalty_interval: the penalty is taken on every so manieth step of the discriminator.
        """
        norm_free = any(getattr(module, "overflows_in_float16", False) for module in self.modules())
        if penalty_interval > 1 and isinstance(self._penalty, NoPenalty):
            raise UserError(f"training.penalty_interval={penalty_interval} has nothing to act on: penalty=none")
        if self._allow_known_bad:
            return
        if precision == "16-mixed" and norm_free:
            raise _known_bad(
                "trainer.precision=16-mixed with networks that have no normalization",
                "their activations leave the range of float16",
                "arXiv:2501.05441, appendix E",
                "trainer.precision=bf16-mixed or 32-true",
            )
        if penalty_interval > 1 and isinstance(self._loss, Relativistic):
            raise _known_bad(
                f"training.penalty_interval={penalty_interval} with adversarial_loss=relativistic",
                "with a penalty on some steps only it failed on Stacked MNIST and on the grid",
                "arXiv:2501.05441, appendix E",
                "training.penalty_interval=1",
            )

    def _refuse_known_bad(self, has_spectral_norm: bool) -> None:
        takes_both = self._penalty.of_real and self._penalty.of_fake
        if any(isinstance(module, _BatchNorm) for module in self.discriminator.modules()):
            if takes_both:
                raise _known_bad(
                    "batch norm in the discriminator with penalty=r1_r2",
                    "the penalty is on the slope at each example, and batch norm makes it hang on the other examples",
                    "arXiv:2501.05441, appendix E",
                    "discriminator.batch_norm=false",
                )
            if self._is_gradient_penalty:
                raise _known_bad(
                    "batch norm in the discriminator with penalty=gradient_penalty",
                    "the penalty is on the slope at each example, and batch norm makes it hang on the other examples",
                    "arXiv:1704.00028, section 4",
                    "discriminator.batch_norm=false",
                )
        if isinstance(self._loss, Wasserstein):
            if has_spectral_norm and not self._loss.drift:
                raise _known_bad(
                    "adversarial_loss=wasserstein with model.spectral_norm=true and no drift term",
                    "only differences of logits count, and nothing keeps their level from wandering off",
                    "the drift term is that of arXiv:1710.10196, appendix A.1",
                    "adversarial_loss.drift=0.001",
                )
            if not has_spectral_norm and not (self._penalty.of_real or self._penalty.of_fake or self._is_gradient_penalty):
                raise _known_bad(
                    "adversarial_loss=wasserstein with neither a penalty nor spectral norm",
                    "nothing bounds the critic's slope, so its loss has no minimum",
                    "arXiv:1701.07875, section 3",
                    "penalty=gradient_penalty or model.spectral_norm=true",
                )

    @property
    def _is_gradient_penalty(self) -> bool:
        return isinstance(self._penalty, GradientPenalty)

    def _sample_like(self, batch: Batch, noise: Noise) -> Tensor:
        """As many samples, of the same classes and of the same precision as the examples of a batch."""
        return self.sample(len(batch), batch.condition, generator=noise).to(batch.x.dtype)

    def _augmented(self, packed: Tensor, noise: Noise) -> Tensor:
        """Packs `(B, m C, ...)` with each of their examples augmented by itself."""
        x = packed.reshape(-1, *self._spec.shape)
        return self._augmentation(x, noise).reshape(packed.shape)

    def _pack(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to `(B // m, m C, ...)`: m examples in a row are one; up to m - 1 at the end are left out."""
        m = self._packing
        x = x[: len(x) // m * m]
        return x.reshape(len(x) // m, m * x.shape[1], *x.shape[2:])

    def _class_loss(self, verdict: Verdict, condition: Tensor | None) -> Terms:
        """Cross-entropy of the class that the discriminator names, `(B,)` in nats, if it names one."""
        if verdict.class_logits is None:
            return {}
        assert condition is not None
        return {"class": F.cross_entropy(verdict.class_logits, condition, reduction="none")}

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None


def _known_bad(what: str, why: str, source: str, cure: str) -> UserError:
    return UserError(
        f"{what} is known to fail: {why} ({source}); set {cure}, or model.allow_known_bad=true to see it for yourself"
    )
