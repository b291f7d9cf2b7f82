# SPDX-License-Identifier: Apache-2.0
"""Train the bundled target and its EAGLE drafts from openly licensed text: `python -m aiterlab.spec_decode.train`."""
