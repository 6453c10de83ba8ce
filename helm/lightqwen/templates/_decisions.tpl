{{/* What follows from values, each decided in one place. */}}

{{- define "lightqwen.ranksPerPod" -}}
{{ div (int .Values.engine.tensorParallelSize) (int .Values.engine.nodes) }}
{{- end -}}

{{- define "lightqwen.autoscaled" -}}
{{ if or .Values.autoscaling.keda.enabled .Values.autoscaling.hpa.enabled }}true{{ end }}
{{- end -}}

{{/* More than one pod may run at the same time. */}}
{{- define "lightqwen.manyPods" -}}
{{- $autoscaled := include "lightqwen.autoscaled" . -}}
{{ if or (and $autoscaled (gt (int .Values.autoscaling.maxReplicas) 1)) (gt (int (default 1 .Values.replicaCount)) 1) (include "lightqwen.multiNode" .) }}true{{ end }}
{{- end -}}

{{- define "lightqwen.terminationGracePeriodSeconds" -}}
{{- with .Values.lifecycle -}}
{{ add (int .preStopSeconds) (int .withdrawalSeconds) (int .drainSeconds) (int .marginSeconds) }}
{{- end -}}
{{- end -}}

{{- define "lightqwen.downloadBudgetSeconds" -}}
{{ ternary .Values.model.huggingFace.downloadBudgetSeconds 0 (eq .Values.model.source "huggingFace") }}
{{- end -}}

{{/* A node of several waits for the others, and they may still be downloading when it is not. */}}
{{- define "lightqwen.startupBudgetSeconds" -}}
{{- $download := include "lightqwen.downloadBudgetSeconds" . | int -}}
{{ add (int .Values.probes.startupBudgetSeconds) (ternary $download 0 (eq (include "lightqwen.multiNode" .) "true")) }}
{{- end -}}

{{- define "lightqwen.progressDeadlineSeconds" -}}
{{ add (int .Values.probes.startupBudgetSeconds) (include "lightqwen.downloadBudgetSeconds" . | int) 300 }}
{{- end -}}

{{/* One folder for each revision: on a shared volume, pods of the old one serve on while the new one is fetched. */}}
{{- define "lightqwen.modelFolder" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "huggingFace" -}}
/models/{{ $model.huggingFace.repository }}/{{ $model.huggingFace.revision }}
{{- else if ne $model.source "demo" -}}
{{ printf "/models/%s" $model.path | trimSuffix "/" }}
{{- end -}}
{{- end -}}

{{- define "lightqwen.servedModelName" -}}
{{- $model := .Values.model -}}
{{- if $model.name -}}
{{ $model.name }}
{{- else if eq $model.source "huggingFace" -}}
{{ $model.huggingFace.repository }}
{{- else if $model.path -}}
{{ base $model.path }}
{{- end -}}
{{- end -}}

{{- define "lightqwen.modelClaimName" -}}
{{- if eq .Values.model.source "pvc" -}}
{{ .Values.model.pvc.claimName }}
{{- else if .Values.model.huggingFace.storage.claimName -}}
{{ .Values.model.huggingFace.storage.claimName }}
{{- else if .Values.model.huggingFace.storage.size -}}
{{ include "lightqwen.fullname" . }}-models
{{- end -}}
{{- end -}}

{{/* The server's options that the chart decides, as one map: server.toml, and what `config` must leave alone. */}}
{{- define "lightqwen.decided" -}}
model: {{ include "lightqwen.modelFolder" . | quote }}
{{- with include "lightqwen.servedModelName" . }}
served_model_name: {{ . | quote }}
{{- end }}
device: {{ .Values.engine.device }}
tensor_parallel_size: {{ .Values.engine.tensorParallelSize }}
{{- if include "lightqwen.multiNode" . }}
nodes: {{ .Values.engine.nodes }}
leader_port: {{ .Values.ports.leader }}
join_timeout_s: {{ include "lightqwen.startupBudgetSeconds" . }}
{{- end }}
host: "0.0.0.0"
port: {{ .Values.ports.grpc }}
health_host: "0.0.0.0"
health_port: {{ .Values.ports.health }}
metrics_host: "0.0.0.0"
metrics_port: {{ .Values.ports.metrics }}
withdrawal_s: {{ .Values.lifecycle.withdrawalSeconds }}
drain_timeout_s: {{ .Values.lifecycle.drainSeconds }}
{{- if .Values.tls.enabled }}
tls_cert: /etc/lightqwen/tls/tls.crt
tls_key: /etc/lightqwen/tls/tls.key
{{- if .Values.tls.clientCaSecretName }}
tls_client_ca: {{ printf "/etc/lightqwen/client-ca/%s" .Values.tls.clientCaKey | quote }}
{{- end }}
{{- end }}
{{- if .Values.auth.tokensSecretName }}
auth_tokens_file: {{ printf "/etc/lightqwen/tokens/%s" .Values.auth.tokensKey | quote }}
{{- end }}
{{- if .Values.auth.adminTokensSecretName }}
admin_tokens_file: {{ printf "/etc/lightqwen/admin-tokens/%s" .Values.auth.adminTokensKey | quote }}
{{- end }}
{{- end -}}

{{/* JSON's strings, numbers and booleans are TOML's too. */}}
{{- define "lightqwen.serverToml" -}}
{{- range $key, $value := merge (include "lightqwen.decided" . | fromYaml) .Values.config }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end -}}
