"""What is odd about files, told before anything is made of them."""
