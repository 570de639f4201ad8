"""Object detection with one-time-step spiking networks, on torchvision."""
