"""The network: elastic blocks, backbone, BiFPN and heads."""
