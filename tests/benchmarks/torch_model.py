"""The same network in PyTorch."""

import numpy as np
import torch


def torch_model(params):
    """Linear layers with these weights, and ReLU between them."""
    layers = []
    for layer in params:
        n_in, n_out = layer["w"].shape
        linear = torch.nn.Linear(n_in, n_out)
        linear.weight.data = torch.tensor(np.array(layer["w"].T))
        linear.bias.data = torch.tensor(np.array(layer["b"]))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])
