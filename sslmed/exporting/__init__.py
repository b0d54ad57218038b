"""Models for other readers: timm, ONNX Runtime, torch.export."""
