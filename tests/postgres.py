"""A temporary PostgreSQL server with the tables that Neuronpedia's importer writes to."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CREATOR = "clkht01d40000jv08hvalcvly"

TABLES = """
CREATE TYPE "Visibility" AS ENUM ('PUBLIC', 'UNLISTED', 'PRIVATE');
CREATE TABLE "User" ("id" text PRIMARY KEY, "name" text NOT NULL UNIQUE, "email" text UNIQUE);
CREATE TABLE "SourceRelease" (
  "name" text PRIMARY KEY, "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE',
  "isNewUi" boolean NOT NULL DEFAULT false, "featured" boolean NOT NULL DEFAULT false,
  "description" text NOT NULL, "descriptionShort" text, "urls" text[],
  "creatorEmail" text, "creatorName" text NOT NULL, "creatorNameShort" text,
  "creatorId" text NOT NULL REFERENCES "User" ("id") ON DELETE CASCADE,
  "defaultSourceSetName" text, "defaultSourceId" text, "defaultUmapSourceIds" text[] DEFAULT ARRAY[]::text[],
  "createdAt" timestamp(3) NOT NULL DEFAULT now());
CREATE TABLE "Model" (
  "id" text PRIMARY KEY, "displayNameShort" text NOT NULL DEFAULT '', "displayName" text NOT NULL DEFAULT '',
  "creatorId" text NOT NULL REFERENCES "User" ("id") ON DELETE CASCADE, "tlensId" text, "openRouterId" text,
  "dimension" integer, "thinking" boolean NOT NULL DEFAULT false, "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE',
  "defaultSourceSetName" text, "defaultSourceId" text, "defaultGraphSourceSetName" text,
  "inferenceEnabled" boolean NOT NULL DEFAULT false, "instruct" boolean NOT NULL DEFAULT false,
  "layers" integer NOT NULL, "neuronsPerLayer" integer NOT NULL, "createdAt" timestamp(3) NOT NULL DEFAULT now(),
  "owner" text NOT NULL, "updatedAt" timestamp(3) NOT NULL DEFAULT now(), "website" text);
CREATE TABLE "SourceSet" (
  "modelId" text NOT NULL REFERENCES "Model" ("id") ON DELETE CASCADE, "name" text NOT NULL,
  "hasDashboards" boolean NOT NULL DEFAULT true, "allowInferenceSearch" boolean NOT NULL DEFAULT true,
  "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE', "description" text NOT NULL, "type" text NOT NULL DEFAULT '',
  "creatorName" text NOT NULL, "urls" text[], "creatorEmail" text,
  "creatorId" text NOT NULL REFERENCES "User" ("id") ON DELETE CASCADE,
  "releaseName" text REFERENCES "SourceRelease" ("name") ON DELETE CASCADE,
  "hasGraphs" boolean NOT NULL DEFAULT false, "graphEnabled" boolean NOT NULL DEFAULT false,
  "similarityMatrixEnabled" boolean NOT NULL DEFAULT false, "defaultOfModelId" text, "defaultGraphModelId" text,
  "defaultRange" integer NOT NULL DEFAULT 1, "defaultShowBreaks" boolean NOT NULL DEFAULT true,
  "showDfa" boolean NOT NULL DEFAULT false, "showCorrelated" boolean NOT NULL DEFAULT false,
  "showHeadAttribution" boolean NOT NULL DEFAULT false, "showUmap" boolean NOT NULL DEFAULT false,
  "createdAt" timestamp(3) NOT NULL DEFAULT now(), UNIQUE ("modelId", "name"));
CREATE TABLE "Source" (
  "id" text NOT NULL, "modelId" text NOT NULL, "hasDashboards" boolean NOT NULL DEFAULT true,
  "inferenceEnabled" boolean NOT NULL DEFAULT false, "saelensConfig" jsonb, "saelensRelease" text, "saelensSaeId" text,
  "hfRepoId" text, "hfFolderId" text, "visibility" "Visibility" NOT NULL DEFAULT 'PRIVATE', "defaultOfModelId" text,
  "setName" text NOT NULL, "creatorId" text NOT NULL REFERENCES "User" ("id") ON DELETE CASCADE,
  "hasUmap" boolean NOT NULL DEFAULT false, "hasUmapLogSparsity" boolean NOT NULL DEFAULT false,
  "hasUmapClusters" boolean NOT NULL DEFAULT false, "num_prompts" integer, "num_tokens_in_prompt" integer,
  "dataset" text, "notes" text, "cosSimMatchModelId" text, "cosSimMatchSourceId" text,
  "createdAt" timestamp(3) NOT NULL DEFAULT now(), UNIQUE ("modelId", "id"),
  FOREIGN KEY ("modelId", "setName") REFERENCES "SourceSet" ("modelId", "name"));
CREATE TABLE "Neuron" (
  "modelId" text NOT NULL REFERENCES "Model" ("id") ON DELETE CASCADE, "layer" text NOT NULL, "index" text NOT NULL,
  "sourceSetName" text, "creatorId" text REFERENCES "User" ("id") ON DELETE CASCADE,
  "createdAt" timestamp(3) NOT NULL DEFAULT now(), "maxActApprox" double precision DEFAULT 0,
  "hasVector" boolean NOT NULL DEFAULT false, "vector" double precision[] DEFAULT ARRAY[]::double precision[],
  "vectorLabel" text, "vectorDefaultSteerStrength" double precision DEFAULT 10, "hookName" text,
  "topkCosSimIndices" integer[], "topkCosSimValues" double precision[], "neuron_alignment_indices" integer[],
  "neuron_alignment_values" double precision[], "neuron_alignment_l1" double precision[],
  "correlated_neurons_indices" integer[], "correlated_neurons_pearson" double precision[],
  "correlated_neurons_l1" double precision[], "correlated_features_indices" integer[],
  "correlated_features_pearson" double precision[], "correlated_features_l1" double precision[], "neg_str" text[],
  "neg_values" double precision[], "pos_str" text[], "pos_values" double precision[],
  "frac_nonzero" double precision NOT NULL DEFAULT 0, "freq_hist_data_bar_heights" double precision[],
  "freq_hist_data_bar_values" double precision[], "logits_hist_data_bar_heights" double precision[],
  "logits_hist_data_bar_values" double precision[], "decoder_weights_dist" double precision[], "umap_cluster" integer,
  "umap_log_feature_sparsity" double precision, "umap_x" double precision, "umap_y" double precision,
  UNIQUE ("modelId", "layer", "index"),
  FOREIGN KEY ("modelId", "layer") REFERENCES "Source" ("modelId", "id") ON DELETE CASCADE,
  FOREIGN KEY ("modelId", "sourceSetName") REFERENCES "SourceSet" ("modelId", "name") ON DELETE CASCADE);
CREATE TABLE "Activation" (
  "id" text PRIMARY KEY, "tokens" text[], "dataIndex" text, "index" text NOT NULL, "layer" text NOT NULL,
  "modelId" text NOT NULL, "dataSource" text, "maxValue" double precision NOT NULL,
  "maxValueTokenIndex" integer NOT NULL, "minValue" double precision NOT NULL,
  "values" double precision[], "dfaValues" double precision[],
  "dfaTargetIndex" integer, "dfaMaxValue" double precision, "zQIndices" integer[], "zKIndices" integer[],
  "zValues" double precision[], "creatorId" text NOT NULL REFERENCES "User" ("id") ON DELETE CASCADE,
  "createdAt" timestamp(3) NOT NULL DEFAULT now(), "lossValues" double precision[], "logitContributions" text,
  "binMin" double precision, "binMax" double precision, "binContains" double precision, "qualifyingTokenIndex" integer,
  FOREIGN KEY ("modelId", "layer", "index") REFERENCES "Neuron" ("modelId", "layer", "index") ON DELETE CASCADE);
CREATE TABLE "Explanation" (
  "id" text PRIMARY KEY, "modelId" text NOT NULL REFERENCES "Model" ("id") ON DELETE CASCADE, "layer" text NOT NULL,
  "index" text NOT NULL, "description" text NOT NULL,
  "authorId" text NOT NULL REFERENCES "User" ("id") ON DELETE CASCADE, "triggeredByUserId" text, "notes" text,
  "scoreV1" double precision NOT NULL DEFAULT 0, "scoreV2" double precision, "umap_x" double precision DEFAULT 0,
  "umap_y" double precision DEFAULT 0, "umap_cluster" integer DEFAULT 0,
  "umap_log_feature_sparsity" double precision DEFAULT 0, "typeName" text, "explanationModelName" text,
  "createdAt" timestamp(3) NOT NULL DEFAULT now(), "updatedAt" timestamp(3) NOT NULL DEFAULT now(),
  FOREIGN KEY ("modelId", "layer", "index") REFERENCES "Neuron" ("modelId", "layer", "index") ON DELETE CASCADE);
"""


def _unavailable(reason: str) -> None:
    """Skip the test, or fail if tests must not be skipped."""
    if os.environ.get("JSAE_REQUIRE_POSTGRES") == "1":
        pytest.fail(f"JSAE_REQUIRE_POSTGRES=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    if not found[-1].is_file():
        _unavailable("PostgreSQL is not installed: apt-get install postgresql")
    return found[-1].parent


def _as_somebody(folder: Path) -> list[str]:
    """Return the prefix of commands that root may not run: Debian's package creates the user postgres."""
    if os.geteuid() != 0:
        return []
    try:
        shutil.chown(folder, "postgres", "postgres")
    except LookupError:
        _unavailable("root may not run PostgreSQL, and there is no user postgres to do it")
    if not (setpriv := shutil.which("setpriv")):
        _unavailable("root may not run PostgreSQL, and there is no setpriv to become postgres")
    return [str(setpriv), "--reuid=postgres", "--regid=postgres", "--clear-groups"]


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Run a server on its own socket within the context; yield the conninfo of its first database."""
    programs = _programs()
    with tempfile.TemporaryDirectory(prefix="jsae-pg-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # not pytest's: other users may not enter that, and a socket's path must be short
        become, data = _as_somebody(folder), folder / "data"
        done = subprocess.run(
            [
                *become,
                programs / "initdb",
                "-D",
                data,
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-locale",
                "-N",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        settings = [f"-k {folder}", "-c listen_addresses=", "-c fsync=off", "-c shared_buffers=16MB"]
        control = [*become, programs / "pg_ctl", "-D", data, "-s", "-w"]
        log = folder / "log"
        started = subprocess.run(
            [*control, "-l", log, "-o", " ".join(settings), "start"], cwd=folder, check=False, timeout=60
        )
        assert started.returncode == 0, log.read_text()
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder, check=True, timeout=60)
