# SPDX-License-Identifier: Apache-2.0
"""Is a result right, how long did it take, and how fast could the hardware be? Checks come before times."""
