# SPDX-License-Identifier: Apache-2.0
"""What would every vLLM release choose on every AMD GPU, and does that agree with the documented policy?"""
