"""Does your model's path lie in the outlier directions, layer by layer? The alignment study on a model of your own."""

import torch
from sklearn.datasets import load_digits

import curvopt
from curvopt import diagnostics

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)[:1000] / 16 - 0.3
labels = torch.tensor(digits.target)[:1000]
loss_fn = torch.nn.CrossEntropyLoss()
rank = 9  # k = C - 1 for cross-entropy with C classes

model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
start = [p.detach().clone() for p in model.parameters()]
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
hessian = curvopt.Hessian(model, loss_fn, (images, labels))
moment = curvopt.GradientSecondMoment(model, loss_fn, (images, labels))

done = 0
for steps in (20, 300):  # a poor classifier, and a better one
    for _ in range(steps - done):
        index = torch.randint(1000, (50,))
        optimizer.zero_grad()
        loss_fn(model(images[index]), labels[index]).backward()
        optimizer.step()
    done = steps
    accuracy = float((model(images).argmax(1) == labels).float().mean())
    print(f"after {steps} steps, accuracy {accuracy:.2f}")
    displacement = {id(p): p.detach() - old for p, old in zip(model.parameters(), start, strict=True)}
    blocks = moment.layers()
    for name, block in hessian.layers().items():
        h, m = curvopt.eigsh(block, k=rank), curvopt.eigsh(blocks[name], k=rank)
        moved = torch.cat([displacement[id(p)].flatten() for p in model.get_submodule(name).parameters()])
        share = float(diagnostics.dominant_share(moved, h)) ** 2
        null = diagnostics.haar_share(rank, len(moved)).mean
        above = int((h.eigenvalues > 0.05 * h.eigenvalues[0]).sum())
        print(
            f"  layer {name}: overlap of H's and M's top {rank} {diagnostics.subspace_overlap(h, m):.2f}; share of the "
            f"displacement in H's {share:.3f} (random {null:.3f}); {above} of {rank} eigenvalues above 5 % of the first"
        )
