{{/* What both Ray clusters have. */}}

{{/* A RayCluster's spec up to its groups. Call with (list $ AUTOSCALER). */}}
{{- define "rankgr.rayCluster" -}}
{{- $top := index . 0 -}}
{{- $autoscaler := index . 1 -}}
rayVersion: {{ $top.Values.ray.version }}
authOptions:
  mode: token
  secretName: {{ $top.Values.ray.existingSecret }}
enableInTreeAutoscaling: true
autoscalerOptions:
  upscalingMode: Default
  idleTimeoutSeconds: {{ $autoscaler.idleTimeoutSeconds }}
  imagePullPolicy: {{ $top.Values.image.pullPolicy }}
  resources:
    {{- toYaml $autoscaler.resources | nindent 4 }}
  securityContext:
    {{- include "rankgr.containerSecurity" $top | nindent 4 }}
  env:
    - {name: HOME, value: /tmp/ray}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: ray-logs, mountPath: /tmp/ray}
{{- end }}

{{/* Environment of every Ray node. */}}
{{- define "rankgr.rayEnv" -}}
{{ include "rankgr.env" . }}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_TRAIN_ENABLE_PREEMPTION_WATCHER, value: "0"}
{{- end }}

{{- define "rankgr.rayVolumes" -}}
{{ include "rankgr.volumes" . }}
- name: ray-logs
  emptyDir: {}
{{- end }}

{{- define "rankgr.rayMounts" -}}
{{ include "rankgr.mounts" . }}
- {name: ray-logs, mountPath: /tmp/ray}
{{- end }}

{{/* KubeRay's own probes call wget in the container; these need nothing there, and Ray asks them for no token. */}}
{{- define "rankgr.headProbes" -}}
startupProbe:
  httpGet: {path: /api/gcs_healthz, port: 8265}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/gcs_healthz, port: 8265}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  httpGet: {path: /api/gcs_healthz, port: 8265}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* Call with (list PATH PORT), of what makes the worker ready. */}}
{{- define "rankgr.workerProbes" -}}
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  httpGet: {path: {{ index . 0 }}, port: {{ index . 1 }}}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* Spread over machines. Call with (list $ COMPONENT). */}}
{{- define "rankgr.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "rankgr.selector" . | nindent 8 }}
        rankgr/node: worker
{{- end }}

{{/* Node label of a GPU model, as NVIDIA's feature discovery writes it. */}}
{{- define "rankgr.gpuProduct" -}}
{{- get (dict
  "t4" "Tesla-T4"
  "l4" "NVIDIA-L4"
  "a10" "NVIDIA-A10"
  "a10g" "NVIDIA-A10G"
  "l40s" "NVIDIA-L40S"
  "a100-40gb" "NVIDIA-A100-SXM4-40GB"
  "a100-80gb" "NVIDIA-A100-SXM4-80GB"
  "h100" "NVIDIA-H100-80GB-HBM3"
  "h200" "NVIDIA-H200") . -}}
{{- end }}
