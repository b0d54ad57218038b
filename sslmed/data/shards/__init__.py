"""What a store consists of on the disk, and how it is written."""
