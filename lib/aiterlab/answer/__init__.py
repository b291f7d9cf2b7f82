# SPDX-License-Identifier: Apache-2.0
"""The investigation's answer on one page: find the other notebooks' records, make tables and sentences of them."""
