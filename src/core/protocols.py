"""What a model can do. Metrics, callbacks and entry points ask for a capability, never for a class.

Each protocol is checked with `isinstance` at run time, by the presence of its methods. A capability that a model has in
general but not as it is configured (a bound, with a reconstruction loss that is no likelihood) raises `NotApplicable`.

Conventions: `x` is `(B, *spec.shape)` in data units; `condition` is `(B,)` int64 class labels or None; `generator` is the
source of randomness, None for unrepeatable draws; losses and likelihoods are per example, `(B,)`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from src.core.batch import Batch
from src.core.rng import Noise
from src.core.tokens import TokenChoice

__all__ = [
    "Adversarial",
    "CanBeSteered",
    "CanBound",
    "CanClassify",
    "CanContinue",
    "CanDecode",
    "CanEncode",
    "CanInpaint",
    "CanMixStyles",
    "CanQuantize",
    "CanReconstruct",
    "CanSample",
    "CanScore",
    "CanWeigh",
    "CompletesOnePart",
    "CountsEvaluations",
    "CountsLikelihoodEvaluations",
    "ExpectationMaximization",
    "FollowsTraining",
    "HasBaseline",
    "HasPaths",
    "HasPosterior",
    "HasPrior",
    "HasSettings",
    "NeedsPreparation",
    "PredictsTokens",
    "ScoresPart",
    "ScoresTokens",
    "StartsFromWeights",
    "Styled",
    "Terms",
    "Trainable",
]

Terms = dict[str, Tensor]
"""Named quantities of one batch, each `(B,)` per example; of a training loss, `loss` is the objective to minimise."""


@runtime_checkable
class CanSample(Protocol):
    is_conditional: bool  # True if `sample` needs class labels

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """n new examples, `(n, *spec.shape)` in data units."""
        ...


@runtime_checkable
class CanScore(Protocol):
    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """Log likelihood, `(B,)` in nats: exact, or an unbiased estimate of it if `settings` says so (`HasSettings`)."""
        ...


@runtime_checkable
class CanBound(Protocol):
    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """A lower bound of the log likelihood, `(B,)` in nats; unbiased for the bound if it is itself an estimate."""
        ...

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """What the bound is the sum of, by name, each `(B,)` in nats: for a VAE the reconstruction and minus the KL."""
        ...


@runtime_checkable
class CanWeigh(Protocol):
    """Has latents, and importance weights of draws from its posterior."""

    def importance_log_weights(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        """log p(x, z_i) - log q(z_i | x) of k = num_samples draws z_i ~ q(z | x), `(B, k)` in nats.

        The mean of their exponentials is an unbiased estimate of p(x). Draw i of an example depends neither on the batch
        nor on how many are drawn at a time.
        """
        ...


@runtime_checkable
class HasPrior(Protocol):
    """Has latents, and likelihoods of draws from their prior."""

    def prior_log_likelihoods(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        """log p(x | z_i) of k = num_samples draws z_i ~ p(z), `(B, k)` in nats; the mean of their exponentials is an
        unbiased estimate of p(x), with far more noise than that of `CanWeigh`."""
        ...


@runtime_checkable
class HasBaseline(Protocol):
    """Has a network beside it that does the same without latents."""

    def baseline_log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Its exact log likelihood, `(B,)` in nats."""
        ...


@runtime_checkable
class ScoresPart(Protocol):
    """Its likelihoods are of a part of the example, given the rest."""

    of_what: str  # in words, for cards


@runtime_checkable
class HasSettings(Protocol):
    def settings(self) -> dict[str, Any]:
        """What its samples and its likelihood depend on besides its weights, in plain types: solver, steps, guidance."""
        ...


@runtime_checkable
class CountsEvaluations(Protocol):
    """Draws its samples by many evaluations of one network, and counts them."""

    num_evaluations: int  # of one example each, in sampling, since the model was built


@runtime_checkable
class CountsLikelihoodEvaluations(Protocol):
    """Computes a likelihood by many evaluations of one network, and counts them."""

    num_likelihood_evaluations: int  # of one example each, forwards, in likelihoods, since the model was built


@runtime_checkable
class HasPaths(Protocol):
    """Moves a draw of one distribution to an example along dx/dt = v(x, t), within a time of 1."""

    def path_energy_terms(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """What the energy of a path, the integral of |v|^2 dt, is the sum of: of n samples, each `(n,)` in squared units:

            displacement    |x(1) - x(0)|^2, the energy of the straight line in even speed
            bend            the integral of |v - (x(1) - x(0))|^2 dt, which is 0 of that line alone

        The units are those of the data. The paths are followed as `path_settings` says, whatever the steps of samples.
        """
        ...

    def path_settings(self) -> dict[str, Any]:
        """Where the paths begin, in words, and the solver that follows them, with its accuracy; plain types.

        The beginnings depend on the source and on how the data are standardized before: energies are compared only where
        both are the same.
        """
        ...


@runtime_checkable
class CanBeSteered(Protocol):
    def steer(self, *, steps: int | None = None, guidance: float | None = None) -> None:
        """Draw from now on in so many steps, and with such weight of the condition; None leaves it as it is.

        Raises `UserError` for what it cannot do, as guidance without a condition.
        """
        ...


@runtime_checkable
class CanReconstruct(Protocol):
    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x after a round trip through the model's code, deterministic, `(B, *spec.shape)` in data units."""
        ...


@runtime_checkable
class CanQuantize(Protocol):
    num_codes: int

    def quantize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The codes that x is told by, numbers from 0 to num_codes - 1, deterministic, `(B, ...)` int64."""
        ...


@runtime_checkable
class CanDecode(Protocol):
    """Draws its samples as `decode(z)` of z ~ N(0, I), which is the same for all classes."""

    latent_dim: int

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The example of z `(B, latent_dim)`, deterministic, `(B, *spec.shape)` in data units."""
        ...


@runtime_checkable
class Styled(Protocol):
    """A generator that draws in two steps: a latent vector to a style for each of its layers, and styles to an image."""

    def styles(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """From z `(B, D)` and a condition vector `(B, K)` or None, `(B, num_layers, style_dim)`."""
        ...

    def synthesize(self, styles: Tensor, noise: Noise | None) -> Tensor:
        """The image `(B, C, H, W)` of styles; its further noise is drawn from `noise`, and fixed without it."""
        ...

    def truncate(self, styles: Tensor, psi: float) -> Tensor:
        """Styles moved towards their mean: at 1 as they were, at 0 the mean itself."""
        ...


@runtime_checkable
class CanMixStyles(Protocol):
    """Draws its samples by way of a style for each layer of its generator, if `has_styles`."""

    latent_dim: int
    has_styles: bool

    def styles(self, z: Tensor, condition: Tensor | None = None, *, truncation: float | None = None) -> Tensor:
        """The styles of z `(B, latent_dim)`, `(B, num_layers, style_dim)`, the first layers the coarse ones.

        With `truncation` they are moved towards their mean: at 1 they are as without, at 0 all the mean itself.
        """
        ...

    def decode_styles(self, styles: Tensor, *, generator: Noise | None = None) -> Tensor:
        """The example of styles, `(B, *spec.shape)` in data units; further noise is fixed without a `generator`."""
        ...


@runtime_checkable
class CanEncode(Protocol):
    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The code of x, deterministic, `(B, latent_dim)`."""
        ...

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The example of code z, deterministic, `(B, *spec.shape)` in data units."""
        ...


@runtime_checkable
class HasPosterior(Protocol):
    """Infers a Gaussian of diagonal covariance over its latents, q(z | x)."""

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), each `(B, latent_dim)`."""
        ...

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The example of z, deterministic, `(B, *spec.shape)` in data units."""
        ...


@runtime_checkable
class CanInpaint(Protocol):
    def inpaint(
        self, x: Tensor, mask: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None
    ) -> Tensor:
        """Examples that are x `(B, *spec.shape)` where `mask`, of the same shape, is True, and drawn elsewhere."""
        ...


@runtime_checkable
class PredictsTokens(Protocol):
    """Gives every token the distribution that those before it leave, as an autoregressive model does."""

    max_context: int | None  # tokens before one that can tell of it; None for any number

    def log_probs(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(x_t | x_0 .. x_{t-1}) of the tokens `(B, T)` but the first of each row, `(B, T-1)` in nats.

        T - 1 is at least 1, and at most `max_context`.
        """
        ...


@runtime_checkable
class ScoresTokens(Protocol):
    """Gives every token of a whole example its share of the example's likelihood."""

    def token_log_probs(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(x_t | x_0 .. x_{t-1}) of all tokens `(B, T)`, the first included, `(B, T)` in nats; exact. Their sum is
        the likelihood of the example."""
        ...


@runtime_checkable
class CanContinue(Protocol):
    """Draws tokens that follow given ones."""

    is_conditional: bool
    sampling: TokenChoice  # how tokens are drawn, here and in samples; may be replaced

    def continue_(
        self,
        prompt: Tensor,
        num_tokens: int,
        condition: Tensor | None = None,
        *,
        choice: TokenChoice | None = None,
        is_done: Callable[[Tensor], Tensor] | None = None,
        generator: Noise | None = None,
    ) -> list[Tensor]:
        """What follows each row of the prompt `(B, P)`, `(num_tokens,)` each; P may be 0, and more than the model can see.

        Args:
            prompt: tokens, int64.
            num_tokens: drawn of each row.
            condition: `(B,)` classes, of a conditional model.
            choice: how each token is drawn; None for the model's own settings.
            is_done: called with what was drawn so far `(B, i)`, says `(B,)` of which rows it is the end; these are shorter.
        """
        ...


class NextTokenNetwork(Protocol):
    """A causal network: the logits at a place depend on the tokens up to it.

    It can also be read token by token, with a state that keeps what it needs of the tokens before: keys and values, the
    recurrent state, or the queues of convolutions. Both ways give the same logits.
    """

    max_length: int | None  # the longest input; None for any length
    num_tokens: int  # V

    def state_size(self, length: int) -> int:
        """How many numbers the state of one row holds after so many tokens, about; 0 if it is small whatever they are."""
        ...

    def __call__(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits `(B, T, V)` of the token after each of `(B, T)` int64; the condition is `(B, C)` features or None."""
        ...

    def begin(self, batch_size: int) -> Any:
        """The state before the first token of so many rows, on the network's device."""
        ...

    def step(self, token: Tensor, state: Any, condition: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits `(B, V)` of the token after `(B,)`, and the next state; at most `max_length` steps from the beginning."""
        ...

    def read(self, tokens: Tensor, state: Any, condition: Tensor | None = None) -> tuple[Tensor, Any]:
        """As so many steps: logits `(B, V)` of the token after `(B, L)`, L at least 1, and the next state."""
        ...


@runtime_checkable
class CompletesOnePart(Protocol):
    """A `CanInpaint` that was made for one mask and takes no other."""

    known_mask: Tensor  # `(*spec.shape)` bool, True where a value is known
    known_in_words: str  # as in "the left half"


@runtime_checkable
class CanClassify(Protocol):
    def classify(self, x: Tensor) -> Tensor:
        """Class logits, `(B, num_classes)`."""
        ...


@runtime_checkable
class NeedsPreparation(Protocol):
    """Looks at the training data once before the first step: for scales, starting points, statistics."""

    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Set weights and buffers by the data; the same on every device of a run.

        Args:
            examples: each call gives all training examples once, in batches in data units, in their order.
            generator: the same on every device.
        """
        ...


@runtime_checkable
class StartsFromWeights(Protocol):
    """A network that may begin its training with weights that were trained elsewhere."""

    def load_weights(self) -> None:
        """Take them, if there are any; called once, before the first step of a training.

        Raises `UserError` if they cannot be read or do not fit. Whoever rebuilds a trained model does not call it.
        """
        ...


@runtime_checkable
class FollowsTraining(Protocol):
    """Has an objective that changes in the course of the training."""

    def follow(self, examples_seen: int) -> None:
        """Told before every step how many training examples were seen, over all devices. Not told in evaluation mode,
        where the objective is always the same, so that held-out losses of different times can be compared."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """Trained by following the gradient of one loss."""

    objective: str  # what the loss is, in words, with all that its value depends on but the weights

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms: ...


@runtime_checkable
class Adversarial(Protocol):
    """Trained by two players with an optimizer each."""

    def players(self) -> tuple[nn.Module, nn.Module]:
        """The generator and the discriminator: disjoint sets of parameters."""
        ...

    def discriminator_loss(self, batch: Batch, *, penalty_scale: float = 1.0, generator: Noise | None = None) -> Terms:
        """With `penalty_scale` as a further weight of what is minimised besides the game; 0 leaves it out."""
        ...

    def generator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms: ...

    def logits(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """How real the discriminator finds examples, as it sees them: one value for each, or for each few together."""
        ...

    def refuse_training(self, precision: str, penalty_interval: int) -> None:
        """Raise `UserError` for a way of training that the model is known to fail with."""
        ...


@runtime_checkable
class ExpectationMaximization(Protocol):
    """Trained without gradients: statistics of examples are added up, and give the next parameters."""

    objective: str  # what falls with every maximization, in words
    maximizes_every_batch: bool  # or else after an epoch
    statistics: Tensor  # added up since the last maximization, a sum over examples; a buffer

    def accumulate(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """Add the statistics of a batch under the present parameters; its terms, as of a training loss."""
        ...

    def maximize(self, share: float = 1.0) -> dict[str, float]:
        """Set the parameters to what the statistics say, and begin new ones.

        Args:
            share: of the examples of an epoch, the share that the statistics are of.

        Returns:
            What is worth a curve, by name.
        """
        ...

    def negative_log_likelihood(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The terms of held-out examples, of which `loss` is the objective."""
        ...
