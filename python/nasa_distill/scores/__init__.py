"""Scores of images and videos of any model: CLIP, HPSv2 and VBench.

Experimental: none of them has run with its published weights here. Loading and arithmetic are
tested with small stand-ins; compare with the original before you report a score.
"""
