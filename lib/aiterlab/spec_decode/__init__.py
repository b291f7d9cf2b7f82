# SPDX-License-Identifier: Apache-2.0
"""Run EAGLE speculative decoding in the real vLLM engine: lossless? how many tokens accepted? how fast, and why?"""
