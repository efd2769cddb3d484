import numpy as np
import paddle
from paddle import nn

from distill.roles import AdapterRole, adapter_roles
from fast_diffusers import lora


class Net(nn.Layer):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)


class NetDenoiser:
    embeds_guidance = True

    def __init__(self, net):
        self.net = net

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        return self.net.proj(x)

    def features(self, x, t, cond, taps=None, *, guidance=None):
        return [self.net.proj(x)]


def test_one_network_plays_every_role():
    net = Net()
    x = paddle.randn([2, 4])
    base = net.proj(x).numpy()
    for name in ("student", "fake"):
        for p in lora.inject(net, 2, 2, ["proj"], name=name):
            p.set_value(paddle.randn(p.shape))
    roles = adapter_roles(NetDenoiser(net), net, "student", "fake")
    t = paddle.ones([2])
    np.testing.assert_array_equal(roles.teacher(x, t, {}).numpy(), base)
    np.testing.assert_array_equal(roles.teacher.features(x, t, {})[0].numpy(), base)
    student, fake = roles.student(x, t, {}).numpy(), roles.fake(x, t, {}).numpy()
    np.testing.assert_array_equal(roles.target(x, t, {}).numpy(), student)
    assert np.abs(student - base).max() > 0.1 and np.abs(student - fake).max() > 0.1


def test_the_student_is_its_own_fake_score_unless_there_is_another():
    net = Net()
    lora.inject(net, 2, 2, ["proj"], name="student")
    roles = adapter_roles(NetDenoiser(net), net, "student")
    assert roles.fake is roles.student


def test_a_role_without_adapters_is_the_model():
    net = Net()
    denoiser, x = NetDenoiser(net), paddle.randn([2, 4])
    role = AdapterRole(denoiser, net, None)
    np.testing.assert_array_equal(role(x, paddle.ones([2]), {}).numpy(), net.proj(x).numpy())
    assert role.embeds_guidance
    denoiser.embeds_guidance = False
    assert not role.embeds_guidance
