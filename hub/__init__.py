# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub: repositories and cards, conversion of published checkpoints, ONNX export, and the page of a model."""
