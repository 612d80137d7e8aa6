"""NVFP4 quantisation by a scale that is known beforehand."""
