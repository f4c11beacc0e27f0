"""What distilled sets are for, one file per use, on top of the library's verbs.

- `replay`: the memory of a network that learns classes one task after the other.
- `federated`: clients that send sets in place of weights.
- `search`: architectures, ranked by a set.
- `audit`: what a set tells about the images that it was made from.

They share how data become a part within a budget (`summary`), the file in which parts lie (`archive`), and how networks
learn from several sources at once (`learning`). The command lines have their names: `train.replay` and so on.
"""
