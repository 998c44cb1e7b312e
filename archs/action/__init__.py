"""Action backbones: networks that classify what happens in a clip, and their features at several scales."""
