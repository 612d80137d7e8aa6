"""The transpose of a tensor to NVFP4, through the Hadamard transform."""
