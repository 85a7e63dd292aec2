"""Closed forms of variational inference with diagonal Gaussians.

A diagonal Gaussian is given by its mean `mu` and log variance `log_var`, both `(B, D)`.

References:
    Kingma, Welling 2014, "Auto-encoding variational Bayes", arXiv:1312.6114, appendix B.
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519: the bounds L_k.
"""

import math

import torch
from torch import Tensor

from src.core.rng import Noise

__all__ = ["gaussian_kl", "gaussian_kl_per_dim", "gaussian_log_prob", "importance_weighted_bound", "reparameterize"]


def gaussian_kl(mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(q || p) of two diagonal Gaussians, `(B,)` in nats, summed over dimensions."""
    return gaussian_kl_per_dim(mu_q, log_var_q, mu_p, log_var_p).sum(1)


def gaussian_kl_per_dim(mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor, log_var_p: Tensor) -> Tensor:
    """The KL of each dimension of two diagonal Gaussians, `(B, D)` in nats.

    KL_d = 1/2 [ log_var_p - log_var_q + (var_q + (mu_q - mu_p)^2) / var_p - 1 ]
    """
    log_ratio = log_var_q - log_var_p
    distance = (mu_q - mu_p).square() * (-log_var_p).exp()
    return 0.5 * (log_ratio.exp() + distance - 1 - log_ratio)


def gaussian_log_prob(x: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    """log N(x; mu, exp(log_scale)^2) of every value, same shape as x, in nats."""
    return -0.5 * ((x - mu) * (-log_scale).exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """L_k = log mean_i exp(log_weights_i) of k weights log p(x, z_i) - log q(z_i | x), `(B, k)` to `(B,)`, in nats.

    Its expectation is a lower bound of log p(x), the ELBO at k = 1, and it does not fall as k grows (Burda et al. 2016,
    theorem 1).
    """
    return torch.logsumexp(log_weights, 1) - math.log(log_weights.shape[1])


def reparameterize(mu: Tensor, log_var: Tensor, generator: Noise) -> Tensor:
    """A draw z = mu + exp(log_var / 2) * eps with eps ~ N(0, I), shape of mu, differentiable in mu and log_var."""
    return mu + (0.5 * log_var).exp() * generator.normal(tuple(mu.shape), like=mu)
