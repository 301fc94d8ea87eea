{{/* Names. KubeRay appends up to 30 characters to a RayService's. */}}
{{- define "rankgr.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 26 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 26 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 26 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* What selectors use; it never changes between versions of the chart. Call with (list $ COMPONENT). */}}
{{- define "rankgr.selector" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/part-of: rankgr
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "rankgr.podLabels" -}}
{{- $top := index . 0 -}}
{{ include "rankgr.selector" . }}
{{- with $top.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "rankgr.labels" -}}
{{- $top := index . 0 -}}
{{ include "rankgr.podLabels" . }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Call with (list $ COMPONENT SUFFIX). */}}
{{- define "rankgr.metadata" -}}
{{- $top := index . 0 -}}
name: {{ include "rankgr.fullname" $top }}-{{ index . 2 }}
namespace: {{ $top.Release.Namespace }}
labels:
  {{- include "rankgr.labels" (list $top (index . 1)) | nindent 2 }}
{{- end }}

{{/* Call with (list $ IMAGE DEFAULT_TAG). */}}
{{- define "rankgr.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 2) $image.tag) -}}
{{- end -}}
{{- end }}

{{- define "rankgr.trainImage" -}}
{{- include "rankgr.image" (list . .Values.image.train (printf "%s-python3.11" .Chart.AppVersion)) -}}
{{- end }}

{{- define "rankgr.serveImage" -}}
{{- include "rankgr.image" (list . .Values.image.serve (printf "%s-python3.11" .Chart.AppVersion)) -}}
{{- end }}

{{- define "rankgr.podSecurity" -}}
runAsNonRoot: true
{{ toYaml .Values.podSecurity }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "rankgr.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* What every pod has. Call with (list $ PLACEMENT ACCOUNT NEEDS_API), PLACEMENT with nodeSelector and tolerations. */}}
{{- define "rankgr.pod" -}}
{{- $top := index . 0 -}}
{{- $place := index . 1 -}}
serviceAccountName: {{ include "rankgr.fullname" $top }}-{{ index . 2 }}
automountServiceAccountToken: {{ index . 3 }}
enableServiceLinks: false
securityContext:
  {{- include "rankgr.podSecurity" $top | nindent 2 }}
{{- with $top.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "rankgr.redisUrl" -}}
{{- if .Values.redis.enabled -}}
redis://{{ include "rankgr.fullname" . }}-redis:6379/0
{{- else -}}
{{- required "redis.external.url: which Redis? Name one, or set redis.enabled=true" .Values.redis.external.url -}}
{{- end -}}
{{- end }}

{{- define "rankgr.redisUser" -}}
{{- if .Values.redis.enabled }}rankgr{{ else }}{{ .Values.redis.external.username }}{{ end -}}
{{- end }}

{{- define "rankgr.mlflowUri" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "rankgr.fullname" . }}-mlflow:5000
{{- else -}}
{{- required "mlflow.external.uri: which MLflow? Name one, or set mlflow.enabled=true" .Values.mlflow.external.uri -}}
{{- end -}}
{{- end }}

{{- define "rankgr.trainingApi" -}}
http://{{ include "rankgr.fullname" . }}-training-head-svc:8265
{{- end }}

{{- define "rankgr.serves" -}}
{{- if and .Values.serving.enabled .Values.serving.bundle }}true{{ end -}}
{{- end }}

{{/* All settings: the user's, and what follows from the chart. */}}
{{- define "rankgr.settings" -}}
{{- $store := dict "url" (include "rankgr.redisUrl" .) "password" "env:RANKGR_REDIS_PASSWORD" -}}
{{- if include "rankgr.redisUser" . }}{{ $_ := set $store "username" "env:RANKGR_REDIS_USERNAME" }}{{ end -}}
{{- if and (not .Values.redis.enabled) .Values.redis.external.caSecret -}}
{{- $_ := set $store "ca_file" "/etc/rankgr-redis/ca.crt" -}}
{{- end -}}
{{- $tokens := list -}}
{{- range $index, $_ := .Values.api.tokenKeys }}{{ $tokens = append $tokens (printf "env:RANKGR_TOKEN_%d" $index) }}{{ end -}}
{{- $own := dict
  "tracking" (dict "uri" (include "rankgr.mlflowUri" .))
  "slate_store" $store
  "serving" (dict "host" "0.0.0.0" "port" 8000 "tokens" $tokens "retrieval_replicas" .Values.serving.ingressReplicas)
  "streaming" (dict "metrics_host" "0.0.0.0" "metrics_port" 8001)
-}}
{{- mustMergeOverwrite (deepCopy .Values.config) $own | toYaml -}}
{{- end }}

{{/* Environment of RankGR's containers. Redis' password, S3 keys and MLflow's token come from secrets. */}}
{{- define "rankgr.env" -}}
- {name: HOME, value: /tmp}
- {name: USER, value: rankgr}
- name: RANKGR_REDIS_URL
  value: {{ include "rankgr.redisUrl" . }}
{{- with include "rankgr.redisUser" . }}
- name: RANKGR_REDIS_USERNAME
  value: {{ . | quote }}
{{- end }}
- name: RANKGR_REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.passwordKey }}
- name: RANKGR_IMAGE
  value: {{ include "rankgr.trainImage" . }}
{{- if and (not .Values.mlflow.enabled) .Values.mlflow.external.existingSecret }}
- name: MLFLOW_TRACKING_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.mlflow.external.existingSecret }}
      key: {{ .Values.mlflow.external.tokenKey }}
{{- end }}
{{- include "rankgr.storageEnv" . }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "rankgr.storageEnv" -}}
{{- with .Values.objectStorage }}
{{- if .endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ .endpoint }}
{{- end }}
{{- if .region }}
- name: AWS_DEFAULT_REGION
  value: {{ .region }}
{{- end }}
{{- if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .accessKeyIdKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .secretAccessKeyKey }}
{{- end }}
{{- end }}
{{- end }}

{{/* Tokens that the service accepts. */}}
{{- define "rankgr.tokenEnv" -}}
{{- range $index, $key := .Values.api.tokenKeys }}
- name: RANKGR_TOKEN_{{ $index }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.api.existingSecret }}
      key: {{ $key }}
{{- end }}
{{- end }}

{{/* For clients of a Ray cluster; inside the clusters KubeRay sets both. */}}
{{- define "rankgr.rayClientEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.ray.existingSecret }}
      key: auth_token
{{- end }}

{{/* The root is read-only: what is written goes to /tmp. */}}
{{- define "rankgr.volumes" -}}
- name: tmp
  emptyDir: {}
- name: settings
  configMap:
    name: {{ include "rankgr.fullname" . }}-settings
{{- if .Values.workspaceVolume.enabled }}
- name: workspace
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-workspace" (include "rankgr.fullname" .)) .Values.workspaceVolume.existingClaim }}
{{- end }}
{{- if and (not .Values.redis.enabled) .Values.redis.external.caSecret }}
- name: redis-ca
  secret:
    secretName: {{ .Values.redis.external.caSecret }}
    items:
      - {key: {{ .Values.redis.external.caKey }}, path: ca.crt}
{{- end }}
{{- end }}

{{- define "rankgr.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: settings, mountPath: /etc/rankgr, readOnly: true}
{{- if .Values.workspaceVolume.enabled }}
- {name: workspace, mountPath: /workspace}
{{- end }}
{{- if and (not .Values.redis.enabled) .Values.redis.external.caSecret }}
- {name: redis-ca, mountPath: /etc/rankgr-redis, readOnly: true}
{{- end }}
{{- end }}

{{/* Pods restart when the settings change. */}}
{{- define "rankgr.settingsHash" -}}
rankgr/settings-sha256: {{ include "rankgr.settings" . | sha256sum }}
{{- end }}
