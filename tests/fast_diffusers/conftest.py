import pytest


class GaussianData:
    """Data N(mean, std^2) in every coordinate: velocity and flow map of x_t = (1 - t) x0 + t eps in closed form."""

    def __init__(self, mean: float = 0.7, std: float = 0.4):
        self.mean, self.std = mean, std

    def variance(self, t):
        return ((1 - t) * self.std) ** 2 + t**2

    def velocity(self, x, t, target_t=None):
        """E[eps - x0 | x_t = x]; t [B]."""
        t = t.reshape([-1, 1, 1, 1])
        slope = (t - (1 - t) * self.std**2) / self.variance(t)
        return slope * (x - (1 - t) * self.mean) - self.mean

    def flow(self, x, t, target_t):
        """Exact solution at target_t of the ODE that is at x at time t; times are floats or broadcast over x."""
        scale = (self.variance(target_t) / self.variance(t)) ** 0.5
        return (1 - target_t) * self.mean + scale * (x - (1 - t) * self.mean)

    def chord(self, x, t, target_t):
        """Velocity of the straight line to the exact solution at target_t: a perfect any-step model; times [B]."""
        t, target_t = t.reshape([-1, 1, 1, 1]), target_t.reshape([-1, 1, 1, 1])
        return (self.flow(x, t, target_t) - x) / (target_t - t)


@pytest.fixture
def gaussian() -> GaussianData:
    return GaussianData()
