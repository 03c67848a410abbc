# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Publishing to the Hugging Face Hub: model repositories and their cards, and conversion of published checkpoints."""
