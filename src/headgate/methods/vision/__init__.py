"""Vision models: backbones and layers for images and feature maps."""
