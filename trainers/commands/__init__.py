# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The commands: `flm-train`, `flm-distill`, `flm-generate` and `flm-evaluate`."""
