"""Labels, masks and boxes: from files, into stores and out of them."""
