"""Figure 3: accuracy against average cost on CIFAR100, with and without the techniques.

    python experiments/paper/figure_3.py --train

Beside them stand ResNets and DenseNets, which compute all layers for all images. The paper does not
give the depths of its ResNets.
"""
