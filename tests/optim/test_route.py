"""The measured route of a block product travels with the checkpoint: another one would change the last bits."""

import torch

import curvopt


def build(route=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    data = torch.randn(32, 6), torch.randint(0, 3, (32,))
    curvature = curvopt.Hessian(model, torch.nn.CrossEntropyLoss(), data, route=route)
    optimizer = curvopt.BulkSGD(model.parameters(), lr=0.1, curvature=curvature, rank=2, refresh_every=5)
    torch.nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    return curvature, optimizer


def test_the_route_is_saved_and_restored():
    curvature, opt = build(route="batched")
    opt.step()
    saved = opt.state_dict()
    assert saved["param_groups"][0]["curvopt_route"] == "batched"
    fresh_curvature, fresh = build()
    assert fresh_curvature.route is None
    fresh.load_state_dict(saved)
    assert fresh_curvature.route == "batched" == curvature.route
