# Sourced by the other scripts: where things are, how to speak, how to launch. Sets `root` and `python`.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

say() { printf '[lavis-svp] %s\n' "$*"; }

# fail MESSAGE...: one line per argument, on standard error; ends the script.
fail() {
  printf '[lavis-svp] %s\n' "$@" >&2
  exit 1
}

# help_wanted ARGS...: if -h or --help is among the arguments, print the comment at the top of the running script.
help_wanted() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help)
        sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$0"
        return 0
        ;;
    esac
  done
  return 1
}

# whole NAME VALUE LEAST: the value must be a whole number from LEAST on.
whole() {
  [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "$2" -ge "$3" ] || fail "$1 must be a whole number from $3 on, got '$2'."
}

# launch MODULE DEFAULT_YAML ARGS...: set up, then become `python -m MODULE ARGS` in the processes that ARGS ask for.
# Paths among ARGS are the caller's; the default run works in the clone, so that its output/ is found there again.
launch() {
  local module="$1" yaml="$2" arguments=() name value
  local nproc="" launcher=torch hostfile="" nnodes="" node_rank="" master_addr="" master_port=""
  shift 2
  if help_wanted "$@"; then exit; fi
  while [ $# -gt 0 ]; do
    case "$1" in
      --nproc | --launcher | --hostfile | --nnodes | --node-rank | --master-addr | --master-port)
        [ $# -ge 2 ] || fail "$1 needs a value, as in: --nproc 2"
        name="$1" value="$2"
        shift
        ;;
      --nproc=* | --launcher=* | --hostfile=* | --nnodes=* | --node-rank=* | --master-addr=* | --master-port=*)
        name="${1%%=*}" value="${1#*=}"
        ;;
      *)
        arguments+=("$1")
        shift
        continue
        ;;
    esac
    [ -n "$value" ] || fail "$name needs a value, as in: --nproc 2"
    name="${name#--}"
    printf -v "${name//-/_}" %s "$value"
    shift
  done
  [ -z "$nproc" ] || whole --nproc "$nproc" 1
  [ -z "$nnodes" ] || whole --nnodes "$nnodes" 1
  [ -z "$node_rank" ] || whole --node-rank "$node_rank" 0
  [ -z "$master_port" ] || whole --master-port "$master_port" 1
  [ "$launcher" = torch ] || [ "$launcher" = deepspeed ] || fail "--launcher is torch or deepspeed, got '$launcher'."
  local command=()
  "with_$launcher"
  if [ ${#arguments[@]} -eq 0 ]; then
    cd "$root" || exit
    arguments=(--cfg-path "$yaml")
  fi

  bash "$root/run_scripts/setup.sh"
  exec "$python" -m ${command[@]+"${command[@]}"} "$module" "${arguments[@]}"
}

# with_torch: set `command` of launch to torch.distributed.run; nodes meet by rank, or in any order without --node-rank.
with_torch() {
  [ -z "$hostfile" ] || fail "--hostfile needs --launcher deepspeed; for torch, run this on every node with --nnodes."
  if [ "${nnodes:-1}" -eq 1 ]; then
    [ -z "$node_rank$master_addr$master_port" ] ||
      fail "--node-rank, --master-addr and --master-port need --nnodes 2 or more."
    [ "${nproc:-1}" -eq 1 ] || command=(torch.distributed.run --standalone --nproc_per_node="$nproc" -m)
    return 0
  fi
  [ -n "$master_addr" ] || fail "--nnodes $nnodes needs --master-addr, the name of the first node."
  command=(torch.distributed.run --nnodes="$nnodes" --nproc_per_node="${nproc:-1}")
  if [ -n "$node_rank" ]; then
    [ "$node_rank" -lt "$nnodes" ] || fail "--node-rank must be below --nnodes $nnodes, got $node_rank."
    command+=(--node_rank="$node_rank" --master_addr="$master_addr" --master_port="${master_port:-29500}" -m)
  else
    command+=(--rdzv_backend=c10d --rdzv_id=lavis-svp --rdzv_endpoint="$master_addr:${master_port:-29500}" -m)
  fi
}

# with_deepspeed: set `command` of launch to DeepSpeed's launcher, which starts the processes of all nodes from one.
with_deepspeed() {
  [ -z "$node_rank" ] || fail "--node-rank is for --launcher torch; deepspeed starts all nodes of --hostfile itself."
  command=(deepspeed.launcher.runner --no_local_rank)
  if [ -n "$hostfile" ]; then
    [ -f "$hostfile" ] || fail "--hostfile: there is no file '$hostfile'."
    command+=(--hostfile "$hostfile")
    [ -z "$nnodes" ] || command+=(--num_nodes "$nnodes")
    [ -z "$nproc" ] || command+=(--num_gpus "$nproc")
    [ -z "$master_addr" ] || command+=(--master_addr "$master_addr")
  else
    [ "${nnodes:-1}" -eq 1 ] && [ -z "$master_addr" ] ||
      fail "--launcher deepspeed needs --hostfile for more than one node."
    command+=(--num_gpus "${nproc:-1}")
  fi
  [ -z "$master_port" ] || command+=(--master_port "$master_port")
  command+=(--module)
}
