# SPDX-License-Identifier: Apache-2.0
"""Attention operations behind vLLM's ROCm backends, and the formula that they are checked against."""
